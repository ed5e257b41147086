"""Functions of a matrix: the exponential and the pseudo-inverse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.rules.fallback import from_jvp
from fomoh_fx.rules.registry import register

aten = torch.ops.aten


def _matrix_exp(op: Any, components: Components, a: HyperDual) -> HyperDual:
    """exp of a block triangular matrix: the corner of exp [[A, E], [0, A]] is the derivative along E, and that of
    exp [[A, E, 0], [0, A, F], [0, 0, A]] the half of the second derivative in which E comes before F."""
    x = a.primal

    def first(e: Tensor) -> Tensor:
        return _corner(op, [[x, e], [None, x]])

    def ordered(e: Tensor, f: Tensor) -> Tensor:
        return _corner(op, [[x, e, None], [None, x, f], [None, None, x]])

    tangent = None if a.tangent is None else first(a.tangent)
    if components.second_order is None:
        return HyperDual(op(x), tangent)
    known = None if a.tangent is None else components.product(ordered, a.tangent, a.tangent)
    return HyperDual(op(x), tangent, add(None if a.cross is None else first(a.cross), known))


def _corner(op: Any, blocks: list[list[Tensor | None]]) -> Tensor:
    """The last block of the first row of op(blocks)."""
    given = [b for row in blocks for b in row if b is not None]
    shape = torch.broadcast_shapes(*(b.shape for b in given))
    zero = given[0].new_zeros(()).expand(shape)
    whole = torch.cat([torch.cat([zero if b is None else b.expand(shape) for b in row], -1) for row in blocks], -2)
    return op(whole)[..., : shape[-1], -shape[-1] :]


def _pinv(op: Any, which: Sequence[int], tangents: Sequence[Tensor], a: Tensor, **options: Any) -> Tensor:
    """P = A^+ at constant rank: P_i = -P A_i P + P P^H A_i^H (1 - A P) + (1 - P A) A_i^H P^H P."""
    (moved,) = tangents
    p = op(a, **options)
    adjoint = moved.mH
    left, right = p @ (p.mH @ adjoint), (adjoint @ p.mH) @ p
    return -(p @ (moved @ p)) + left - (left @ a) @ p + right - p @ (a @ right)


register(aten.linalg_matrix_exp.default, _matrix_exp, "linear algebra")
register(aten.linalg_pinv.atol_rtol_tensor, from_jvp(_pinv), "linear algebra")
