"""Tensors of a run that outlive it in what is no attribute of a model: a global list, the variable of a closure.

What attributes have is carried: :mod:`fomoh_fx.capture.assignments`. Elsewhere a tensor of the tracer would stay for
ever. The cache of a function (``functools.lru_cache``) is cleared: what it has is computed anew.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from types import CellType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from fomoh_fx.capture.assignment import kept_elsewhere
from fomoh_fx.capture.semantics import is_real
from fomoh_fx.containers import children, is_a_users, is_record, slots_of
from fomoh_fx.sizes import SYMBOLIC

_Cache = type(functools.lru_cache(len))
_Link: Any = getattr(functools, "_lru_list_elem", _Cache)
_INNER = {dict, list, tuple, deque, set, CellType, _Link}
_UNSEARCHED = (type, ModuleType, nn.Module, *SYMBOLIC)
_MOST = 10_000  # objects that are searched


def refuse_kept(made: Iterable[weakref.ref[Tensor]], returned: Sequence[Any]) -> None:
    """Refuse a model whose run has left its tensors where the model finds them again; from lists they are removed.

    Args:
        made: the tensors of the run.
        returned: what the model returns beside tensors; it may have them.

    Raises:
        CaptureError: naming the place.
    """
    allowed = set(_inside(returned))
    if _search(_alive(made, allowed), allowed) == ([], None):
        return
    gc.collect()  # contexts of autograd refer to themselves
    caches, _ = _search(_alive(made, allowed), allowed)
    for cache in caches:
        cache.cache_clear()
    alive = _alive(made, allowed)
    _, where = _search(alive, allowed)
    if where is not None:
        _remove(alive)
        raise kept_elsewhere(where)


def has_tensors_behind(value: Any) -> bool:
    """Whether a tensor of a run can be reached from an object, by whatever it has."""
    seen: set[int] = set()
    todo = [value]
    while todo and len(seen) < _MOST:
        one = todo.pop()
        if isinstance(one, Tensor):
            if not is_real(one):
                return True
        elif id(one) not in seen and not isinstance(one, _UNSEARCHED):
            seen.add(id(one))
            is_function = isinstance(one, FunctionType)  # which refers to all global variables
            todo += [one.__closure__, one.__defaults__] if is_function else gc.get_referents(one)
    return False


def _alive(made: Iterable[weakref.ref[Tensor]], but: set[int]) -> list[Tensor]:
    return [tensor for ref in made if (tensor := ref()) is not None and id(tensor) not in but]


def _inside(values: Iterable[Any], depth: int = 6) -> Iterable[int]:
    for value in values:
        yield id(value)
        if depth and (inside := children(value)) is not None:
            yield from _inside((inside, *inside.values()), depth - 1)


def _search(tensors: Sequence[Tensor], allowed: set[int]) -> tuple[list[Any], str | None]:
    """The caches of functions that the tensors are in, and the first variable or object of a user's that has one."""
    caches: list[Any] = []
    level: list[Any] = list(tensors)
    for _ in range(5):
        found = gc.get_referrers(*level) if level else []
        ours = {id(level), id(tensors)}
        following = []
        for holder in found:
            if id(holder) in ours or id(holder) in allowed:
                continue
            if type(holder) is _Cache:
                caches.append(holder)
            elif (where := _name(holder, level)) is not None:
                return caches, where
            elif type(holder) in _INNER or isinstance(holder, dict):
                following.append(holder)
        level = following
    return caches, None


def _name(holder: Any, held: Sequence[Any]) -> str | None:
    """A variable or an object of a user's code, as a person would name it."""
    if isinstance(holder, FunctionType):
        return f"a variable of the function {holder.__qualname__}" if is_a_users(holder.__module__) else None
    if isinstance(holder, dict):
        if isinstance(holder.get("__module__"), str) and "__doc__" in holder and is_a_users(holder["__module__"]):
            return f"an attribute of a class of {holder['__module__']}"
        module = holder.get("__name__")
        if not isinstance(module, str) or "__builtins__" not in holder or not is_a_users(module):
            return None
        ids = {id(value) for value in held}
        return f"the global variable {module}.{next(name for name, value in holder.items() if id(value) in ids)}"
    is_list = isinstance(holder, (list, tuple, deque)) and hasattr(holder, "__dict__")
    has_attributes = is_record(holder) or is_list or slots_of(holder)
    if type(holder) not in _INNER and has_attributes and is_a_users(type(holder).__module__):
        return f"an object of type {type(holder).__name__}"
    return None


def _remove(tensors: Sequence[Tensor]) -> None:
    """Take the tensors out of the lists, deques and dictionaries that have them."""
    ids = {id(tensor) for tensor in tensors}
    for holder in gc.get_referrers(*tensors):
        if holder is tensors:
            continue
        if type(holder) in (list, deque):
            left = [value for value in holder if id(value) not in ids]
            holder.clear()
            holder.extend(left)
        elif type(holder) is dict and "__builtins__" not in holder:  # a global variable needs to be there
            classes = [cls for cls in gc.get_referrers(holder) if isinstance(cls, type)]
            for key in [key for key, value in holder.items() if id(value) in ids]:
                delattr(classes[0], key) if classes else holder.__delitem__(key)
        elif is_a_users(type(holder).__module__):
            for name in [name for name in slots_of(holder) if id(getattr(holder, name, None)) in ids]:
                setattr(holder, name, None)
