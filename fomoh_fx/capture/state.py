"""Where a model keeps values between its calls: attributes of its modules, and the containers that are in them.

A place leads to a value by a module and keys: the name of an attribute, and then keys, indices and names in the
containers below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fomoh_fx.containers import children, is_record

#: What every module has for itself.
STANDARD = frozenset(vars(nn.Module()))
_MOST = 10_000  # containers that are searched

Keys = tuple[Any, ...]


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
