"""Where a model keeps values between its calls: attributes of its modules, and the containers that are in them.

A container is a dictionary, a list, a tuple, a deque, or an object with attributes of its own. A place leads to a value
by a module and keys: the name of an attribute, and then keys, indices and names in the containers below it.
"""

from __future__ import annotations

import sys
from collections import UserDict, UserList, deque
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

#: What every module has for itself.
STANDARD = frozenset(vars(nn.Module()))
_NOT_RECORDS = (dict, list, tuple, deque, type, Enum, nn.Module, Tensor, FunctionType, MethodType, BuiltinFunctionType)
_NOT_A_MODELS = {"torch", "numpy", "fomoh_fx", *sys.stdlib_module_names}
_MOST = 10_000  # containers that are searched

Keys = tuple[Any, ...]


def children(value: Any) -> MutableMapping[Any, Any] | None:
    """What is in a container, by key, index or name; None for what is no container."""
    if isinstance(value, dict):
        return value
    if isinstance(value, (list, tuple, deque)):
        return dict(enumerate(value))
    return attributes(value) if is_record(value) else None


def is_record(value: Any) -> bool:
    """Whether it is an object that a model has for its data, as a dataclass."""
    if isinstance(value, (SimpleNamespace, UserDict, UserList, Distribution)):
        return True
    if isinstance(value, _NOT_RECORDS) or not (hasattr(value, "__dict__") or slots_of(value)):
        return False
    return type(value).__module__.partition(".")[0] not in _NOT_A_MODELS


def attributes(record: Any) -> MutableMapping[str, Any]:
    """The attributes of an object, which change with it."""
    return _Attributes(record) if slots_of(record) else vars(record)


def slots_of(value: Any) -> list[str]:
    """The names of attributes that are in no dictionary of the object, as its class says."""
    names = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    listed = [name for given in names for name in ((given,) if isinstance(given, str) else given)]
    return [name for name in listed if name not in ("__dict__", "__weakref__")]


class _Attributes(MutableMapping[str, Any]):
    """Those of an object with slots."""

    def __init__(self, record: Any) -> None:
        self._record = record

    def _names(self) -> list[str]:
        slots = [name for name in slots_of(self._record) if hasattr(self._record, name)]
        return [*slots, *getattr(self._record, "__dict__", ())]

    def __getitem__(self, name: str) -> Any:
        if name not in self._names():
            raise KeyError(name)
        return getattr(self._record, name)

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self._record, name, value)  # a frozen dataclass is put back, too

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self._record, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


def containers(module: nn.Module, seen: set[int] | None = None) -> Iterator[tuple[Keys, Any]]:
    """The containers in a module's attributes, each once, but for those that were seen before."""
    seen = set() if seen is None else seen
    most = len(seen) + _MOST
    todo: list[tuple[Keys, Any]] = [((name,), value) for name, value in vars(module).items() if name not in STANDARD]
    while todo and len(seen) < most:
        keys, value = todo.pop()
        inside = children(value)
        if inside is None or id(value) in seen:
            continue
        seen.add(id(value))
        yield keys, value
        todo += [((*keys, key), child) for key, child in inside.items()]


def place_of(module: nn.Module, tensor: Tensor) -> Keys | None:
    """The keys that lead from the module to a tensor that is no parameter or buffer, if it has it."""
    for name, value in vars(module).items():
        if value is tensor:
            return (name,)
    for keys, container in containers(module):
        for key, value in (children(container) or {}).items():
            if value is tensor:
                return (*keys, key)
    return None


def places(module: nn.Module) -> Iterator[tuple[Keys, Tensor]]:
    """The tensors of a module with the keys that lead to them: parameters, buffers, and others."""
    found: list[tuple[Keys, Any]] = [((name,), value) for name, value in vars(module).items()]
    found += [((name,), value) for table in (module._parameters, module._buffers) for name, value in table.items()]
    for keys, container in containers(module):
        found += [((*keys, key), value) for key, value in (children(container) or {}).items()]
    return ((keys, value) for keys, value in found if isinstance(value, Tensor))


def follow(module: nn.Module, keys: Sequence[Any]) -> Any:
    """The value that the keys lead to.

    Raises:
        AttributeError, LookupError: there is none.
    """
    value: Any = getattr(module, keys[0])
    for key in keys[1:]:
        if isinstance(value, dict) and not dict.__contains__(value, key):
            raise KeyError(key)  # a defaultdict would make one
        value = getattr(value, key) if is_record(value) else value[key]
    return value


@contextmanager
def replaced(module: nn.Module, others: Mapping[int, Any]) -> Iterator[None]:
    """Other tensors, by the identity of the own ones, in the places of parameters and buffers.

    ``torch.func.functional_call`` goes by names instead, and a module that has two leaves the other tensors behind.
    """
    tables: list[Any] = [table for part in module.modules() for table in (part._parameters, part._buffers)]
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            table.update({name: others[id(tensor)] for name, tensor in table.items() if id(tensor) in others})
        yield
    finally:
        for table, own in zip(tables, before, strict=True):
            table.clear()
            table.update(own)


def written(keys: Sequence[Any]) -> str:
    """The keys as a person would write them, ``cache['h']``."""
    first, *rest = keys
    return first + "".join(f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]" for key in rest)


_PLAIN = (bool, int, float, str, type(None))


def structure(value: Any, depth: int = 8) -> Any:
    """What a graph depends on in a value beside the numbers of its tensors; two can be compared."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    inside = children(value) if depth else None
    if inside is not None:
        return type(value), [(key, structure(child, depth - 1)) for key, child in inside.items()]
    return (type(value), repr(value)) if type(value) in _PLAIN else type(value)


def has_tensors(value: Any, depth: int = 8) -> bool:
    """Whether a tensor is in it."""
    return any(True for _ in tensors_in(value, depth))


def tensors_in(value: Any, depth: int = 8) -> Iterator[Tensor]:
    """The tensors in it."""
    if isinstance(value, Tensor):
        yield value
    elif depth:
        for child in (children(value) or {}).values():
            yield from tensors_in(child, depth - 1)
