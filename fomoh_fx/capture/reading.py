"""What a model may read of values, as something hashable: equal as long as a model that reads the values does the same.

Plain data count by their values, in containers and in objects that have nothing else; tensors by their kinds, and by
which of them are one tensor; modules, functions, classes and all other objects by identity.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fomoh_fx.capture.state import STANDARD
from fomoh_fx.containers import attributes, is_a_users, is_record, tensors_in

_EXACT = {bool, int, str, type(None)}  # equal ones of one type are the same; of floats 0.0 and -0.0 are not
_SIMPLE = {float, *_EXACT}
_CONSTANTS = {
    *_EXACT, bytes, FunctionType, BuiltinFunctionType, type, torch.dtype, torch.device, torch.layout,
    torch.memory_format,
}  # fmt: skip
_MOST = 10_000  # objects and containers that are read for their contents
_MOST_BYTES = 2**20  # of an array that is read for its contents


#: By module, its attributes that some graph counts up and does not depend on: they are read by the graphs that do.
COUNTED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Reading:
    """What was read; ``kept`` are the objects that count by identity, alive so that no other one gets it."""

    values: tuple[Any, ...]
    kept: list[Any] = field(compare=False)


def kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """What a model may ask of a tensor, beside its values; Dynamo reads this."""
    return tensor.shape, tensor.dtype, tensor.device, strides_of(tensor), tensor.requires_grad


def strides_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The layout of a tensor that is not contiguous: a recorded view is legal for one layout. Dynamo reads this."""
    return None if tensor.is_contiguous() else tensor.stride()


def unusual_strides_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides of a contiguous tensor that has others where the size is 1, which counts as contiguous."""
    if 1 not in tensor.shape or tensor.layout != torch.strided:
        return None
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != step:
            return tensor.stride()
        step *= size
    return None


def is_plain(value: Any) -> bool:
    """Whether all that can be read of it are values, so that an equal one serves as well."""
    if any(isinstance(leaf, FunctionType) and "<locals>" in leaf.__qualname__ for leaf in pytree.tree_leaves(value)):
        return False  # another one at every call
    reader = Reader()
    reader.value(value)
    return reader.is_plain


def are_equal(one: Any, other: Any) -> bool:
    """Whether a model that reads one value does the same with the other."""
    first, second = Reader(), Reader()
    return bool(first.value(one) == second.value(other))


def is_small_array(value: Any) -> bool:
    """Whether it is an array of NumPy's that is read for its contents."""
    return type(value).__module__ == "numpy" and hasattr(value, "tobytes") and value.nbytes <= _MOST_BYTES


class Reader:
    """Reads values one after the other: what it has met before is told from what is only equal."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.is_plain = True  # so far nothing but values has been met
        self._met: dict[int, int] = {}  # tensors, objects and containers by identity
        self._objects = 0  # that are being read, one in the other
        self._limit = 0  # of what is met meanwhile
        self._by_identity: set[int] = set()  # objects that turned out to count so
        self._classes: dict[type, tuple[int, ...]] = {}

    def modules(self, top: nn.Module) -> tuple[Any, ...]:
        """What makes every submodule compute what it does, beside the numbers in its tensors."""
        return tuple([self._module(m) for m in top.modules()])

    def callable(self, function: Any) -> Any:
        """What may be read of a function or an object that is called: its tensors, which no module has, by identity."""
        bound = [function.args, function.keywords] if isinstance(function, partial) else []
        parts = (function, getattr(function, "__self__", None), *bound)
        owned = [tensor for part in parts for tensor in tensors_in(part)]
        self.kept += owned
        return self.value(function), *map(id, owned)

    def value(self, value: Any) -> Any:
        """What may be read of any value."""
        kind = type(value)
        if kind in _CONSTANTS:
            return kind, value
        if kind is float:
            return value.hex()
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, (list, tuple, deque)):
            return kind, getattr(value, "maxlen", None), self._contents(value, self._values)
        if isinstance(value, dict):
            return kind, self._contents(value, self._items)
        return self._other(value)

    def tensor(self, tensor: Tensor | None) -> Any:
        """The kind of a tensor where it is first met, and its number."""
        if tensor is None:
            return None
        self.is_plain = False
        number = self._met.get(id(tensor))
        if number is not None:
            return number
        self._met[id(tensor)] = number = len(self._met)
        return number, type(tensor), kind_of(tensor)

    def _module(self, module: nn.Module) -> tuple[Any, ...]:
        own = vars(module)
        unread = STANDARD | COUNTED[module] if module in COUNTED else STANDARD
        children = own["_modules"]
        self.kept.append(module)
        return (
            id(module),
            type(module),
            self._class(type(module)),
            module.training,
            (*children.keys(), *map(id, children.values())),  # a scripted module's table has no iterator
            tuple(own["_forward_pre_hooks"]),  # by numbers that PyTorch gives only once
            tuple(own["_forward_hooks"]),
            tuple(own["_backward_pre_hooks"]),
            tuple(own["_backward_hooks"]),
            tuple([(name, self.tensor(t)) for name, t in own["_parameters"].items()]),
            tuple([(name, self.tensor(t)) for name, t in own["_buffers"].items()]),
            tuple([(name, self.value(value)) for name, value in own.items() if name not in unread]),
        )

    def _class(self, kind: type) -> tuple[int, ...]:
        """By identity the methods, properties and values that a module's class has, but for PyTorch's own classes.

        A function's code and defaults count, too: tools that load changed sources anew put other ones into it.
        """
        if kind not in self._classes:
            own = [value for base in kind.__mro__ if is_a_users(base.__module__) for value in vars(base).values()]
            functions = [value for value in own if type(value) is FunctionType]
            own += [part for f in functions for part in (f.__code__, f.__defaults__, f.__kwdefaults__)]
            self.kept += own
            self._classes[kind] = tuple(map(id, own))
        return self._classes[kind]

    def _other(self, value: Any) -> Any:
        """What may be read of what is neither plain, nor a tensor, nor a list or dictionary."""
        if isinstance(value, (type, Enum)):  # of which there is one
            self.kept.append(value)
            return "is", id(value)
        if isinstance(value, nn.Module):
            return self._identity(value)
        if isinstance(value, MethodType):
            return MethodType, value.__func__, self.value(value.__self__)
        if isinstance(value, partial):
            read = self.value(value.func), self._values(value.args), self._items(value.keywords)
            return partial, *read, self._identities(tensors_in([value.args, value.keywords]))
        if isinstance(value, complex):
            return type(value), value.real.hex(), value.imag.hex()
        if isinstance(value, slice):
            return slice, self._values((value.start, value.stop, value.step))
        if isinstance(value, Set):
            tensors = [x for x in value if isinstance(x, Tensor)]
            return type(value), frozenset(map(self.value, value)), frozenset(self._identities(tensors))
        if is_record(value):
            return self._object(value)
        if isinstance(value, bytearray):
            return bytearray, bytes(value)
        if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tobytes"):
            return self._array(value)
        return self._unknown(value)

    def _contents(self, value: Any, read: Any) -> Any:
        """What is in a container; a mutable one may be in itself, and two places may have one."""
        if isinstance(value, tuple):
            return read(value)
        number = self._met.get(id(value))
        if number is not None:
            return number
        self._met[id(value)] = len(self._met)
        if self._objects and len(self._met) > self._limit:
            raise _Unknown
        return read(value)

    def _values(self, values: Iterable[Any]) -> Any:
        values = tuple(iter(values))  # which asks no subclass for its length
        kinds = {*map(type, values)}
        if kinds <= _EXACT:
            return (*kinds, values) if len(kinds) < 2 else (tuple(map(type, values)), values)
        if kinds <= _SIMPLE:
            return tuple(map(repr, values))
        return tuple([self.value(value) for value in values])

    def _items(self, items: Mapping[Any, Any]) -> Any:
        return self._values(items), self._values(items.values())

    def _object(self, value: Any) -> Any:
        """An object by the values in it, unless there is one that counts by identity, or too many."""
        if id(value) in self._by_identity:
            return self._identity(value)
        met, kept = len(self._met), len(self.kept)
        self._objects += 1
        self._limit = self._limit if self._objects > 1 else met + _MOST
        try:
            return type(value), self._contents(value, lambda record: self._items(attributes(record)))
        except (_Unknown, RecursionError):
            if self._objects > 1:
                raise
        finally:
            self._objects -= 1
        for key in list(self._met)[met:]:
            del self._met[key]
        del self.kept[kept:]
        self._by_identity.add(id(value))
        return self._identity(value)

    def _array(self, value: Any) -> Any:
        if value.dtype.hasobject or not is_small_array(value):
            return self._unknown(value)
        return type(value), value.dtype.str, value.shape, value.strides, value.tobytes()

    def _unknown(self, value: Any) -> Any:
        """What counts by identity, and so does the object that has it; a constant of a library goes by equality."""
        self.is_plain &= type(value).__eq__ is not object.__eq__ and not isinstance(value, ReferenceType)
        if type(value).__eq__ is not object.__eq__ and _is_hashable(value):
            return type(value), value
        if self._objects and not callable(value):
            raise _Unknown
        return self._identity(value)

    def _identities(self, tensors: Iterable[Tensor]) -> tuple[int, ...]:
        """Of tensors in what has no places: a graph has them as constants."""
        found = list(tensors)
        self.kept += found
        return tuple(map(id, found))

    def _identity(self, value: Any) -> Any:
        self.is_plain = False
        self.kept.append(value)
        return "is", id(value)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


class _Unknown(Exception):
    """An object has something that counts by identity."""
