"""Factorisations: Cholesky, QR, LU, and products of reflections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.rules.linalg.implicit import (
    adjoint_times,
    diagonal,
    duals,
    hermitian_part,
    identity,
    less,
    orders,
    times_adjoint,
)
from fomoh_fx.rules.linear import refused
from fomoh_fx.rules.registry import Composite, Rule, register

aten = torch.ops.aten


# Cholesky factors.


def _cholesky(components: Components, a: HyperDual, factor: Tensor, upper: bool) -> HyperDual:
    """A = L L^H: L_c = L phi(L^-1 (A_c - sum S (L_i L_j^H + L_j L_i^H)) L^-H).

    phi takes the lower triangle and half of the diagonal.
    """
    lower = factor.mH if upper else factor

    def step(part: Tensor | None, known: Tensor | None) -> Tensor:
        right = less(None if part is None else hermitian_part(part), known)
        inner = aten.linalg_solve_triangular.default(lower, right, upper=False)
        inner = aten.linalg_solve_triangular.default(lower.mH, inner, upper=True, left=False)
        return lower @ (inner.tril() - (diagonal(inner) / 2).diag_embed())

    first, second = orders(components, a, step, lambda l_t: components.product(times_adjoint, l_t, l_t))
    return HyperDual(factor, *(None if p is None else p.mH if upper else p for p in (first, second)))


def _cholesky_ex(
    op: Any, components: Components, a: HyperDual, *, upper: bool = False, check_errors: bool = False
) -> Any:
    factor, info = op(a.primal, upper=upper, check_errors=check_errors)
    return _cholesky(components, a, factor, upper), info


def _cholesky_plain(op: Any, components: Components, a: HyperDual, upper: bool = False) -> Any:
    return _cholesky(components, a, op(a.primal, upper), upper)


def _cholesky_solve(b: Tensor, factor: Tensor, upper: bool = False) -> Tensor:
    lower = factor.mH if upper else factor
    inner = aten.linalg_solve_triangular.default(lower, b, upper=False)
    return aten.linalg_solve_triangular.default(lower.mH, inner, upper=True)


def _cholesky_inverse(factor: Tensor, upper: bool = False) -> Tensor:
    lower = factor.mH if upper else factor
    inverse = aten.linalg_solve_triangular.default(lower, identity(lower), upper=False)
    return inverse.mH @ inverse


# Orthogonal and triangular factors.


def _qr(op: Any, components: Components, a: HyperDual, mode: str = "reduced") -> Any:
    """A = Q R and Q^H Q = 1.

    With G = A_c - sum S (Q_i R_j + Q_j R_i), N = sum S (Q_i^H Q_j + Q_j^H Q_i) and W = Q^H G R^-1 = Q^H Q_c + R_c R^-1,
    Q^H Q_c has the lower part of W, and its Hermitian part is -N / 2. Where R is wide, its first columns serve.
    """
    rows, columns = a.primal.shape[-2:]
    if mode == "complete" and rows > columns:
        raise UnsupportedOpError(
            "the QR decomposition in mode 'complete' of a matrix with more rows than columns is not unique, so it has "
            "no derivative; use mode='reduced'"
        )
    q, r = op(a.primal, "reduced")
    size = q.shape[-1]
    square = r[..., :size]

    def right_solve(x: Tensor) -> Tensor:
        return aten.linalg_solve_triangular.default(square, x, upper=True, left=False)

    def step(part: Tensor | None, known: Any) -> tuple[Tensor, Tensor]:
        product, gram = known or (None, None)
        g = less(part, product)
        inner = q.mH @ g
        w = right_solve(inner[..., :size])
        turn = w.tril(-1) - w.tril(-1).mH
        if w.is_complex():
            turn = turn + torch.complex(torch.zeros_like(diagonal(w).real), diagonal(w).imag).diag_embed()
        if gram is not None:
            turn = turn - gram.triu(1) - (diagonal(gram) / 2).diag_embed()
        r_part = inner - turn @ r
        return (q @ turn if rows <= columns else right_solve(g - q @ r_part)), r_part

    def products(first: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q_t, r_t = first
        return components.product(torch.matmul, q_t, r_t), components.product(adjoint_times, q_t, q_t)

    q_dual, r_dual = duals((q, r), *orders(components, a, step, products))
    return (q_dual, r_dual) if mode != "r" else (op(a.primal, mode)[0], r_dual)


def _lu_parts(
    components: Components, a: HyperDual, permuted: Callable[[Tensor], Tensor], lower: Tensor, upper: Tensor
) -> Any:
    """P^T A = L U: with G = P^T A_c - sum S (L_i U_j + L_j U_i) and M = L^-1 G U^-1, L^-1 L_c is the lower part of M.

    L is unit lower triangular; of a tall or a wide matrix the leading square decides, and the rest follows.
    """
    size = lower.shape[-1]
    tall = lower.shape[-2] > size
    solve = aten.linalg_solve_triangular.default
    lower_square, upper_square = lower[..., :size, :], upper[..., :, :size]

    def step(part: Tensor | None, known: Tensor | None) -> tuple[Tensor, Tensor]:
        g = less(None if part is None else permuted(part), known)
        inner = solve(lower_square, g[..., :size, :], upper=False, unitriangular=True)
        m = solve(upper_square, inner[..., :size], upper=True, left=False)
        l_part = lower_square @ m.tril(-1)
        if not tall:
            return l_part, inner - m.tril(-1) @ upper
        u_part = m.triu() @ upper
        below = solve(upper_square, (g - lower @ u_part)[..., size:, :], upper=True, left=False)
        return torch.cat([l_part, below], -2), u_part

    return orders(components, a, step, lambda first: components.product(torch.matmul, *first))


def _lu_factor_ex(
    op: Any, components: Components, a: HyperDual, *, pivot: bool = True, check_errors: bool = False
) -> Any:
    """The compact form: the strict lower triangle is L, the upper one U."""
    lu, pivots, info = op(a.primal, pivot=pivot, check_errors=check_errors)
    p, lower, upper = aten.lu_unpack.default(lu, pivots, True, pivot)
    parts = _lu_parts(components, a, lambda x: p.mT @ x if pivot else x, lower, upper)
    rows, columns = lu.shape[-2:]

    def compact(part: Any) -> Tensor | None:
        if part is None:
            return None
        l_part, u_part = part
        more = (columns - l_part.shape[-1], rows - u_part.shape[-2])
        l_part = torch.nn.functional.pad(l_part, (0, more[0])) if more[0] else l_part
        u_part = torch.nn.functional.pad(u_part, (0, 0, 0, more[1])) if more[1] else u_part
        return l_part + u_part

    return HyperDual(lu, *map(compact, parts)), pivots, info


def _lu(op: Any, components: Components, a: HyperDual, *, pivot: bool = True) -> Any:
    p, lower, upper = op(a.primal, pivot=pivot)
    parts = _lu_parts(components, a, lambda x: p.mT @ x if pivot else x, lower, upper)
    return (p, *duals((lower, upper), *parts))


def _lu_unpack(op: Any, components: Components, lu: HyperDual, pivots: Any, unpack_data: bool = True,
               unpack_pivots: bool = True) -> Any:  # fmt: skip
    """L and U are the two triangles, the first with a diagonal of ones."""
    p, lower, upper = op(lu.primal, pivots, unpack_data, unpack_pivots)
    if not unpack_data:
        return p, lower, upper
    size = lower.shape[-1]
    parts = (None if x is None else (x[..., :size].tril(-1), x[..., :size, :].triu()) for x in (lu.tangent, lu.cross))
    return (p, *duals((lower, upper), *parts))


def _reflectors(a: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """V and T of a product of reflections 1 - tau v v^H: it is 1 - V T V^H with T = (1 + D triu(V^H V, 1))^-1 D."""
    k = tau.shape[-1]
    v = a[..., :k].tril(-1) + torch.eye(a.shape[-2], k, dtype=a.dtype, device=a.device)
    above = identity(v) + tau.unsqueeze(-1) * (v.mH @ v).triu(1)
    return v, aten.linalg_solve_triangular.default(above, tau.diag_embed(), upper=True, unitriangular=True)


def _householder_product(a: Tensor, tau: Tensor) -> Tensor:
    v, t = _reflectors(a, tau)
    rows, columns = a.shape[-2:]
    return torch.eye(rows, columns, dtype=a.dtype, device=a.device) - v @ (t @ v[..., :columns, :].mH)


def _ormqr(a: Tensor, tau: Tensor, other: Tensor, left: bool = True, transpose: bool = False) -> Tensor:
    v, t = _reflectors(a, tau)
    t = t.mH if transpose else t
    return other - (v @ (t @ (v.mH @ other)) if left else ((other @ v) @ t) @ v.mH)


RULES: dict[Any, Rule] = {
    aten.linalg_cholesky_ex.default: _cholesky_ex,
    aten.linalg_qr.default: _qr,
    aten.linalg_lu_factor_ex.default: _lu_factor_ex,
    aten.linalg_lu.default: _lu,
    aten.lu_unpack.default: _lu_unpack,
}
if hasattr(aten, "cholesky"):  # until torch 2.13
    RULES[aten.cholesky.default] = _cholesky_plain

#: Operators that are other ones, kept whole by capture so that their checks do not break the graph.
COMPOSITES: dict[Any, Callable[..., Any]] = {
    aten.linalg_cholesky.default: lambda a, *, upper=False: aten.linalg_cholesky_ex.default(
        a, upper=upper, check_errors=True
    )[0],
    aten.linalg_lu_factor.default: lambda a, *, pivot=True: aten.linalg_lu_factor_ex.default(
        a, pivot=pivot, check_errors=True
    )[:2],
    aten.cholesky_solve.default: _cholesky_solve,
    aten.cholesky_inverse.default: _cholesky_inverse,
    aten.linalg_householder_product.default: _householder_product,
    aten.ormqr.default: _ormqr,
}

#: Operators of which PyTorch defines no derivative, and what to use.
REFUSED = {
    aten.geqrf.default: ("geqrf's compact form", "torch.linalg.qr"),
    aten.linalg_ldl_factor.default: ("an LDL factorisation", "torch.linalg.cholesky or torch.linalg.lu"),
    aten.linalg_ldl_factor_ex.default: ("an LDL factorisation", "torch.linalg.cholesky or torch.linalg.lu"),
    aten.linalg_ldl_solve.default: ("ldl_solve", "torch.linalg.solve"),
}
for op, (what, instead) in REFUSED.items():
    register(op, refused(f"PyTorch defines no derivative of {what}; use {instead}"))
for op, rule in RULES.items():
    register(op, rule, "linear algebra")
for op, body in COMPOSITES.items():
    register(op, Composite(body))
