"""Constructors of tensors that no tracer sees, as operators.

``torch.Tensor([1, 2])`` and ``torch.LongTensor([1, 2])`` become calls of ``torch.tensor``, and ``torch.tensor([a, b])``
of tensors becomes a stack of their values, without their derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce, wraps
from numbers import Integral
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors

_TYPED = {
    torch.FloatTensor: torch.float32, torch.DoubleTensor: torch.float64, torch.HalfTensor: torch.float16,
    torch.BFloat16Tensor: torch.bfloat16, torch.ByteTensor: torch.uint8, torch.CharTensor: torch.int8,
    torch.ShortTensor: torch.int16, torch.IntTensor: torch.int32, torch.LongTensor: torch.int64,
    torch.BoolTensor: torch.bool,
}  # fmt: skip


@contextmanager
def constructors_recorded() -> Iterator[None]:
    """Let the constructors of tensors be recorded while a model runs."""

    def new(cls: Any, *args: Any, **options: Any) -> Tensor:
        if cls is not Tensor or not _is_recordable(args):
            return torch._C.TensorBase.__new__(cls, *args, **options)
        return _made(torch.get_default_dtype(), args, options)

    _device_constructors()  # which PyTorch looks up once, and for good
    with ExitStack() as stack:
        for name in ("tensor", "as_tensor"):
            stack.enter_context(patch.object(torch, name, _of_elements(getattr(torch, name))))
        for cls, dtype in _TYPED.items():
            stand_in = _Typed(cls.__name__, (), {"of": cls, "dtype": dtype})
            stack.enter_context(patch.object(torch, cls.__name__, stand_in))
        before = vars(Tensor).get("__new__")  # of a capture around this one
        Tensor.__new__ = staticmethod(new)  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            del Tensor.__new__
            if before is not None:
                Tensor.__new__ = before  # type: ignore[method-assign]


def _of_elements(constructor: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The constructor, which stacks tensors of no dimensions in a list."""

    @wraps(constructor)
    def made(data: Any, *args: Any, **options: Any) -> Tensor:
        leaves = pytree.tree_leaves(data) if isinstance(data, (list, tuple)) else []
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or any(t.dim() for t in tensors) or "pin_memory" in options or args:
            return constructor(data, *args, **options)
        dtype = options.get("dtype") or reduce(torch.promote_types, map(_dtype_of, leaves))
        device, learns = options.get("device") or torch.get_default_device(), options.get("requires_grad", False)
        parts = [x.detach() if isinstance(x, Tensor) else constructor(x) for x in leaves]
        stacked = torch.stack([part.to(device, dtype) for part in parts]).reshape(_shape_of(data))
        return stacked.requires_grad_() if learns else stacked

    return made


def index_of_elements(index: Any) -> Any:
    """An index with a tensor in the place of every sequence of tensors in it, whose values PyTorch would read.

    A list alone is an index of each dimension, as a tuple.
    """
    if not isinstance(index, tuple):
        return index
    return tuple(torch.tensor(list(i)) if _is_of_tensors(i) else i for i in index)


def _is_of_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(x, Tensor) for x in value)


def _dtype_of(element: Any) -> torch.dtype:
    return element.dtype if isinstance(element, Tensor) else torch.tensor(element).dtype


def _shape_of(data: Any) -> list[int]:
    """That of nested lists."""
    return [len(data), *_shape_of(data[0])] if isinstance(data, (list, tuple)) else []


class _Typed(type):
    """Stands for a class as ``torch.LongTensor``; ``of`` is that class, which ``x.type(torch.LongTensor)`` needs."""

    of: Any
    dtype: torch.dtype

    def __call__(cls, *args: Any, **options: Any) -> Tensor:
        return _made(cls.dtype, args, options) if _is_recordable(args) else cls.of(*args, **options)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.of)

    def __eq__(cls, other: object) -> bool:
        return cls.of is class_of(other)

    def __hash__(cls) -> int:
        return hash(cls.of)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.of, name)


def class_of(x: Any) -> Any:
    """The class itself, for what stands for it here."""
    return x.of if isinstance(x, _Typed) else x


def _is_recordable(args: tuple[Any, ...]) -> bool:
    """Whether the arguments are sizes, one tensor, or values: all but a storage."""
    return not args or not hasattr(args[0], "data_ptr") or isinstance(args[0], Tensor)


def _made(dtype: torch.dtype, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    if not args or isinstance(args[0], (Integral, torch.SymInt, torch.Size)):
        return torch.empty(*(args or (0,)), dtype=dtype, **options)
    if isinstance(args[0], Tensor):
        return torch.ops.aten.alias.default(args[0])
    return torch.tensor(args[0], dtype=dtype, **options)
