"""Containers: dictionaries, lists, tuples, deques, and objects with attributes of their own, and what is in them."""

from __future__ import annotations

import sys
from collections import UserDict, UserList, deque
from collections.abc import Iterator, MutableMapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

_NOT_RECORDS = (dict, list, tuple, deque, type, Enum, nn.Module, Tensor, FunctionType, MethodType, BuiltinFunctionType)
_NOT_A_USERS = {"torch", "numpy", "fomoh_fx", *sys.stdlib_module_names}


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
    return is_a_users(type(value).__module__)


def is_a_users(module: str | None) -> bool:
    """Whether a module of this name is a user's own code, or another library of models."""
    return (module or "").partition(".")[0] not in _NOT_A_USERS


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
