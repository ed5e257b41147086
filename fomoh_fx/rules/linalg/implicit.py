"""Implicit differentiation: the two orders of an output that satisfies an equation, and what its steps share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual

INFINITY = float("inf")


def orders(
    components: Components, x: HyperDual, step: Callable[[Any, Any], Any], products: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """First and second order of an output: ``step`` at both, with the ``products`` of the first at the second."""
    first = None if x.tangent is None else step(x.tangent, None)
    if components.second_order is None:
        return first, None
    known = None if first is None else products(first)
    return first, None if x.cross is None and known is None else step(x.cross, known)


def less(a: Tensor | None, b: Tensor | None) -> Any:
    """a - b, where None is the symbolic zero."""
    if a is None or b is None:
        return a if b is None else -b
    return a - b


def hermitian_part(x: Tensor) -> Tensor:
    return (x + x.mH) / 2


def diagonal(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1)


def trace(x: Tensor) -> Tensor:
    return diagonal(x).sum(-1)


def identity(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def times_adjoint(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.mH


def adjoint_times(x: Tensor, w: Tensor) -> Tensor:
    return x.mH @ w


def differences(values: Tensor) -> Tensor:
    """E_kl = v_l - v_k, and infinity on the diagonal, where a quotient by E has to vanish."""
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    return gaps.masked_fill(torch.eye(values.shape[-1], dtype=torch.bool, device=values.device), INFINITY)


def duals(primal: Sequence[Tensor], first: Sequence[Any] | None, second: Sequence[Any] | None) -> list[HyperDual]:
    """One dual for each of several outputs, None for the symbolic zeros of all."""
    tangents = first if first is not None else [None] * len(primal)
    crosses = second if second is not None else [None] * len(primal)
    return [HyperDual(*parts) for parts in zip(primal, tangents, crosses, strict=True)]
