"""Determinants and their logarithms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual, Undefined, add
from fomoh_fx.rules.linalg.implicit import diagonal, less, trace
from fomoh_fx.rules.registry import register

aten = torch.ops.aten


def _slogdet(op: Any, components: Components, a: HyperDual) -> Any:
    """l = log det A: l_i = tr(B_i) and l_c = tr(A^-1 A_c) - sum S tr(B_i B_j) with B_i = A^-1 A_i.

    log|det| is its real part, and the sign of a complex determinant is exp(i Im l).
    """
    sign, logabsdet, lu, pivots = op(a.primal)
    factors, swaps, _ = aten.linalg_lu_factor_ex.default(a.primal)

    def solved(part: Tensor) -> Tensor:
        return aten.linalg_lu_solve.default(factors, swaps, part)

    b = None if a.tangent is None else solved(a.tangent)
    first = None if b is None else trace(b)
    second = None
    if components.second_order is not None:
        known = None if b is None else components.product(lambda x, w: (x * w.mT).sum((-2, -1)), b, b) / 2
        second = less(None if a.cross is None else trace(solved(a.cross)), known)
    if not a.primal.is_complex():
        return sign, HyperDual(logabsdet, first, second), Undefined(lu), pivots
    turns = None if first is None else first.imag
    sign_cross = None
    if second is not None:
        sign_cross = second.imag * 1j * sign
        sign_cross = sign_cross if turns is None else sign_cross - components.square(turns) * sign
    real = [None if p is None else p.real for p in (first, second)]
    sign_dual = HyperDual(sign, None if turns is None else turns * 1j * sign, sign_cross)
    return sign_dual, HyperDual(logabsdet, *real), Undefined(lu), pivots


def _det(op: Any, components: Components, a: HyperDual) -> Any:
    """det A = det(U V^H) det S, a polynomial whose derivatives need no inverse, also where A is singular.

    With P_i = U^H A_i V, det(S + P)'s linear part is sum_k P_kk prod_(m != k) s_m, and its quadratic one
    sum_(k < l) (P_kk P_ll - P_kl P_lk) prod_(m != k, l) s_m.
    """
    y, lu, pivots = op(a.primal)
    u, s, vh = aten._linalg_svd.default(a.primal)
    phase = aten._linalg_det.default(u @ vh)[0]
    one = torch.ones_like(s[..., :1])
    before = torch.cat([one, s[..., :-1]], -1).cumprod(-1)
    after = torch.cat([s[..., 1:], one], -1).flip(-1).cumprod(-1).flip(-1)

    def inner(part: Tensor) -> Tensor:
        return u.mH @ part @ vh.mH

    def linear(p: Tensor) -> Tensor:
        return phase * (diagonal(p) * (before * after)).sum(-1)

    p_t = None if a.tangent is None else inner(a.tangent)
    first = None if p_t is None else linear(p_t)
    if components.second_order is None:
        return HyperDual(y, first), Undefined(lu), pivots
    known = None
    if p_t is not None:
        size = s.shape[-1]
        later = torch.ones(size, size, dtype=torch.bool, device=s.device).triu(1)
        between = torch.where(later, s.unsqueeze(-2), 1.0).cumprod(-1)  # prod of s_m for k < m <= l
        weights = before.unsqueeze(-1) * between.roll(1, -1) * after.unsqueeze(-2)
        weights = torch.where(later, weights, 0.0)

        def minors(p: Tensor, q: Tensor) -> Tensor:
            return ((diagonal(p).unsqueeze(-1) * diagonal(q).unsqueeze(-2) - p * q.mT) * weights).sum((-2, -1))

        known = phase * components.product(minors, p_t, p_t)
    second = add(None if a.cross is None else linear(inner(a.cross)), known)
    return HyperDual(y, first, second), Undefined(lu), pivots


register(aten._linalg_slogdet.default, _slogdet, "linear algebra")
register(aten._linalg_det.default, _det, "linear algebra")
