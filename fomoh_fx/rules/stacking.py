"""Applying an operator to components that are stacked along a leading axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fomoh_fx.custom_functions import Argument
from fomoh_fx.hyperdual import HyperDual, primal_of


def align(stacked: Tensor, primal: Tensor, ndim: int) -> Tensor:
    """A view that broadcasts against ``ndim``-dimensional values: size-one axes after the leading one."""
    missing = ndim - primal.ndim
    if missing == 0:
        return stacked
    return stacked.view(stacked.shape[0], *[1] * missing, *primal.shape)  # reshape would guard on the layout


def batched(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], stacks: Mapping[int | str, Any]
) -> Any:
    """``function(*args, **kwargs)`` over the leading axis of stacks, which replace arguments by position or name."""

    def one(*slices: Any) -> Any:
        at = dict(zip(stacks, slices, strict=True))
        positional = [at.get(i, arg) for i, arg in enumerate(args)]
        return function(*positional, **{name: at.get(name, arg) for name, arg in kwargs.items()})

    return torch.vmap(one)(*stacks.values())


def axis(dim: int, x: Tensor) -> int:
    """Where the dimension ``dim`` of ``x`` is in a stack of its components."""
    return dim % max(x.ndim, 1) + 1


def fold(stacked: Tensor) -> Tensor:
    """[K, N, ...] -> [K * N, ...]: the components as more samples of one batch."""
    return stacked.reshape(stacked.shape[0] * stacked.shape[1], *stacked.shape[2:])  # -1 would refuse an empty batch


def unfold(folded: Tensor, count: int) -> Tensor:
    """[K * N, ...] -> [K, N, ...]."""
    return folded.reshape(count, folded.shape[0] // count, *folded.shape[1:])


def active_positions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int | str]:
    """Where the HyperDual arguments stand: positions, then names."""
    found: list[int | str] = [i for i, arg in enumerate(args) if isinstance(arg, HyperDual)]
    return found + [name for name, arg in kwargs.items() if isinstance(arg, HyperDual)]


def primals(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments without their components."""
    return primal_of(tuple(args)), primal_of(dict(kwargs))


def bind(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Every argument of the operator, in order, defaults filled in."""
    missing = arguments_of(op)[len(args) :]
    return [*args, *(kwargs.get(argument.name, argument.default) for argument in missing)]


def arguments_of(op: Any) -> list[Argument]:
    """The arguments of the operator's schema, or of a custom Function or a Triton kernel."""
    if not isinstance(op, OpOverload):
        return op.arguments
    return [Argument(a.name, a.default_value if a.has_default_value() else None) for a in op._schema.arguments]
