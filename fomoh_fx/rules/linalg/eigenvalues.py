"""Eigenvalues and singular values. Equal ones have vectors without derivative: the quotients are then infinite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.rules.linalg.implicit import adjoint_times, diagonal, differences, duals, hermitian_part, less, orders
from fomoh_fx.rules.registry import Composite, register

aten = torch.ops.aten


def _eigen(
    components: Components, a: HyperDual, values: Tensor, vectors: Tensor, *, hermitian: bool
) -> list[HyperDual]:
    """A V = V D: with Q = V^-1 (A_c V + sum S (A_i V_j - V_i D_j + ..)), D_c is its diagonal and V_c = V (Q / E + ..).

    The columns of V keep the length one, which fixes the real part of the diagonal of V^-1 V_c; the imaginary part is
    a choice of phase, and zero for Hermitian matrices.
    """
    gaps = differences(values)
    factors = () if hermitian else aten.linalg_lu_factor_ex.default(vectors)[:2]

    def cast(part: Tensor) -> Tensor:
        return hermitian_part(part) if hermitian else part.to(vectors.dtype)

    def left_solve(x: Tensor) -> Tensor:
        return vectors.mH @ x if hermitian else aten.linalg_lu_solve.default(*factors, x)

    def step(part: Tensor | None, known: Any) -> tuple[Tensor, Tensor]:
        moved, lengths = known or (None, None)
        right = add(None if part is None else cast(part) @ vectors, moved)
        assert right is not None
        q = left_solve(right)
        d_part = diagonal(q).real if hermitian else diagonal(q)
        v_part = vectors @ (q / gaps)
        stretch = None if hermitian else (vectors.conj() * v_part).sum(-2).real
        stretch = add(stretch, None if lengths is None else lengths / 2)
        return d_part, v_part if stretch is None else v_part - vectors * stretch.unsqueeze(-2)

    def products(first: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        d_t, v_t = first
        moved = components.product(torch.matmul, cast(a.tangent), v_t)
        moved = moved - components.product(lambda v, d: v * d.unsqueeze(-2), v_t, d_t)
        return moved, components.product(lambda x, w: (x.conj() * w).sum(-2).real, v_t, v_t)

    return duals((values, vectors), *orders(components, a, step, products))


def _eigh(op: Any, components: Components, a: HyperDual, uplo: str = "L", compute_v: bool = True) -> Any:
    values, vectors = _eigen(components, a, *op(a.primal, uplo, True), hermitian=True)
    return values, vectors if compute_v else op(a.primal, uplo, False)[1]


def _eig(op: Any, components: Components, a: HyperDual) -> Any:
    return tuple(_eigen(components, a, *op(a.primal), hermitian=False))


def _svd(op: Any, components: Components, a: HyperDual, full_matrices: bool = False, compute_uv: bool = True, *,
         driver: str | None = None) -> Any:  # fmt: skip
    """A = U S V^H, U^H U = V^H V = 1.

    With G = A_c - sum S (the products of two tangents in U S V^H) and the Gram terms N_U = sum S (U_i^H U_j + ..), N_V:
    W = U^H G V + (N_U S + S N_V) / 2 = K_U S + S_c - S K_V for the skew parts K of U^H U_c and V^H V_c, so that
    S_c is its diagonal, K_U = (W S + S W^H) / E and K_V = (S W + W^H S) / E with E_kl = s_l^2 - s_k^2.
    """
    rows, columns = a.primal.shape[-2:]
    full = full_matrices and rows != columns and compute_uv
    u_all, s, vh_all = op(a.primal, full, True, driver=driver)
    size = s.shape[-1]
    u, vh = u_all[..., :size], vh_all[..., :size, :]
    v = vh.mH
    across, down = s.unsqueeze(-2), s.unsqueeze(-1)
    gaps = differences(s) * (across + down)

    def step(part: Tensor | None, known: Any) -> tuple[Tensor, Tensor, Tensor]:
        product, u_gram, v_gram = known or (None, None, None)
        g = less(part, product)
        gv, gu = g @ v, g.mH @ u
        w = u.mH @ gv
        if u_gram is not None and v_gram is not None:
            w = w + (u_gram * across + down * v_gram) / 2
        u_turn = (w * across + down * w.mH) / gaps
        v_turn = (down * w + w.mH * across) / gaps
        if w.is_complex():
            phase = torch.complex(torch.zeros_like(diagonal(w).real), diagonal(w).imag / (2 * s)).diag_embed()
            u_turn, v_turn = u_turn + phase, v_turn - phase
        if u_gram is not None and v_gram is not None:
            u_turn, v_turn = u_turn - u_gram / 2, v_turn - v_gram / 2
        return side(u, u_turn, gv), diagonal(w).real, side(v, v_turn, gu)

    def side(vectors: Tensor, turn: Tensor, image: Tensor) -> Tensor:
        inside = vectors @ turn
        if vectors.shape[-2] == size:
            return inside
        return inside + (image - vectors @ (vectors.mH @ image)) / across

    def products(first: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        u_t, s_t, v_t = first
        rest = s_t.unsqueeze(-1) * vh + down * v_t.mH
        product = components.product(torch.matmul, u_t, rest)
        product = product + components.product(lambda x, w: (u * x.unsqueeze(-2)) @ w.mH, s_t, v_t)
        return product, components.product(adjoint_times, u_t, u_t), components.product(adjoint_times, v_t, v_t)

    first, second = orders(components, a, step, products)
    u_dual, s_dual, v_dual = duals((u, s, v), first, second)
    if not compute_uv:
        empty = op(a.primal, full_matrices, False, driver=driver)
        return empty[0], s_dual, empty[2]
    vh_dual = HyperDual(vh, *(None if p is None else p.mH for p in (v_dual.tangent, v_dual.cross)))
    if full and rows > columns:
        u_dual = _completed(components, u_dual, u_all[..., size:])
    elif full:
        v_dual = _completed(components, v_dual, vh_all[..., size:, :].mH)
        vh_dual = HyperDual(vh_all, *(None if p is None else p.mH for p in (v_dual.tangent, v_dual.cross)))
    return u_dual, s_dual, vh_dual


def _completed(components: Components, u: HyperDual, w: Tensor) -> HyperDual:
    """U with further columns W that complete a basis, which turn no more than they have to.

    U^H W = 0 and W^H W = 1: W_c = -U (U_c^H W + sum S (U_i^H W_j + ..)) - W sum S (W_i^H W_j + ..) / 2. The basis W is
    arbitrary, and what does not depend on its choice has its exact derivative.
    """

    def turned(part: Tensor) -> Tensor:
        return -(u.primal @ (part.mH @ w))

    w_t = None if u.tangent is None else turned(u.tangent)
    w_c = None if u.cross is None else turned(u.cross)
    if u.tangent is not None and w_t is not None and components.second_order is not None:
        between = components.product(adjoint_times, u.tangent, w_t)
        w_c = add(w_c, -(u.primal @ between) - w @ components.product(adjoint_times, w_t, w_t) / 2)
    parts = [
        None if left is None or right is None else torch.cat([left, right], -1)
        for left, right in ((u.tangent, w_t), (u.cross, w_c))
    ]
    return HyperDual(torch.cat([u.primal, w], -1), *parts)


for op, rule in {
    aten._linalg_eigh.default: _eigh,
    aten.linalg_eig.default: _eig,
    aten._linalg_svd.default: _svd,
}.items():
    register(op, rule, "linear algebra")
for op in (aten.linalg_eigvals.default, aten._linalg_eigvals.default):
    register(op, Composite(lambda a: aten.linalg_eig.default(a)[0]))
