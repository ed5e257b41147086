"""Values computed from tensors that are written out (``torch.tensor([0, 2])``) may decide branches and shapes.

Fake tensors know such values until something else is written there. The tracer's own record is left out: it misses
what is written through a view.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fomoh_fx.passes.retrace import is_composite_implicit
from fomoh_fx.sizes import SYMBOLIC

aten = torch.ops.aten

MOST = 4096  # elements of a tensor whose values are kept
_NOTHING = -1

#: The namespace of operators that run a user's code.
FUNCTIONS = "fomoh_fx_functions"


def is_small(x: Tensor) -> bool:
    """Whether the values would be kept."""
    return 0 < x.numel() <= MOST and x.layout == torch.strided and not x.is_complex()


@contextmanager
def among_values() -> Iterator[None]:
    """What is computed here is computed now, on values, and is no part of a graph."""
    with unset_fake_temporarily(), disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
        yield


def literal(x: Tensor) -> Tensor:
    """The same values written out."""
    with among_values():
        values, dtype, device = x.tolist(), x.dtype, x.device
    return torch.tensor(values, dtype=dtype, device=device)


def known(x: Any) -> Any:
    """The value of a tensor that is known, None if it is not; what is no tensor itself."""
    while isinstance(x, FunctionalTensor):
        x = torch._from_functional_tensor(x.elem)
    return x.constant if isinstance(x, FakeTensor) else None if isinstance(x, Tensor) else x


@contextmanager
def known_literals() -> Iterator[None]:
    """Let fake tensors know the values of what is written out, and of what is computed from them.

    What PyTorch computes inside an operator that has other arguments as well is for shapes alone: an uninitialised
    tensor, a copy of an argument. Fake tensors would know the values of those, too, and take them for the result's.
    Where an index is true is a shape.
    """
    run, most = FakeTensorMode._dispatch_impl, MOST

    def dispatch(mode: FakeTensorMode, func: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal most
        before, fake_tensor.CONSTANT_NUMEL_LIMIT = most, MOST if func is aten.nonzero.default else most
        most = _NOTHING if _is_for_shapes(func) else most
        try:
            return run(mode, func, *args, **kwargs)
        finally:
            most = fake_tensor.CONSTANT_NUMEL_LIMIT = before

    with (
        patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", MOST),
        patch.object(proxy_tensor, "CONSTANT_NUMEL_LIMIT", _NOTHING),
        patch.object(FakeTensorMode, "_dispatch_impl", dispatch),
    ):
        yield


def _is_for_shapes(func: Any) -> bool:
    """Whether what runs inside the operator computes no values: it is no body of operators, and not a user's code."""
    return isinstance(func, OpOverload) and not is_composite_implicit(func) and func.namespace != FUNCTIONS


#: What makes tensors of numbers inside, which a frontend then does not know; of known tensors, too.
_FACTORIES = {
    torch.arange, torch.eye, torch.full, torch.linspace, torch.logspace, torch.ones, torch.tril_indices,
    torch.triu_indices, torch.zeros, torch.scalar_tensor, torch.where, torch.Tensor.where, torch.nn.functional.one_hot,
    torch.hann_window, torch.hamming_window, torch.blackman_window, torch.bartlett_window, torch.kaiser_window,
}  # fmt: skip


#: The same, of the shape and kind of a tensor whose values do not count.
_LIKE = {
    torch.ones_like, torch.zeros_like, torch.full_like, torch.Tensor.new_ones, torch.Tensor.new_zeros,
    torch.Tensor.new_full,
}  # fmt: skip


class KnownFactories(TorchFunctionMode):
    """What factories make of numbers and of known tensors is known."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES | _LIKE and not kwargs.get("requires_grad"):
            values, named = pytree.tree_map(known, (args, kwargs))
            if func in _LIKE and values:
                values = _standing_for(args[0]), *values[1:]
            if _are_known((values, named), (args, kwargs)):
                with among_values():
                    made = func(*values, **named)
                if isinstance(made, Tensor) and is_small(made):
                    return literal(made)
        return func(*args, **kwargs)


def _standing_for(x: Any) -> Tensor | None:
    """A known tensor of the same kind, None where a size is dynamic."""
    if not isinstance(x, Tensor) or not all(type(size) is int for size in x.shape):
        return None
    with among_values():
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _are_known(values: Any, given: Any) -> bool:
    """Whether every tensor has a value, and no dynamic size is among the arguments."""
    pairs = zip(pytree.tree_leaves(values), pytree.tree_leaves(given), strict=True)
    return not any(isinstance(leaf, SYMBOLIC) or (isinstance(leaf, Tensor) and value is None) for value, leaf in pairs)
