"""Linear algebra, by implicit differentiation of the equation that an output satisfies.

A x = b gives A x_i = b_i - A_i x, and differentiated once more A x_c = b_c - A_c x - sum_ij S_c,ij (A_i x_j + A_j x_i):
the same linear equation with another right-hand side. So each rule has one ``step(part, known)`` that solves the
differentiated equation for one order: ``part`` is the argument's component of that order, and ``known`` is what the
products of tangents contribute, None at first order. A matrix that has to be Hermitian is taken as its Hermitian part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.hyperdual import Components, HyperDual, Undefined, add
from fomoh_fx.rules.fallback import from_jvp
from fomoh_fx.rules.registry import Composite, Rule, register
from fomoh_fx.rules.stacking import align, primals

aten = torch.ops.aten
INFINITY = float("inf")


def _implicit(
    components: Components, x: HyperDual, step: Callable[[Any, Any], Any], products: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """First and second order of an output: ``step`` at both, with the ``products`` of the first at the second."""
    first = None if x.tangent is None else step(x.tangent, None)
    if components.second_order is None:
        return first, None
    known = None if first is None else products(first)
    return first, None if x.cross is None and known is None else step(x.cross, known)


def _less(a: Tensor | None, b: Tensor | None) -> Any:
    """a - b, where None is the symbolic zero."""
    if a is None or b is None:
        return a if b is None else -b
    return a - b


def _hermitian_part(x: Tensor) -> Tensor:
    return (x + x.mH) / 2


def _diagonal(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1)


def _trace(x: Tensor) -> Tensor:
    return _diagonal(x).sum(-1)


def _identity(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _times_adjoint(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.mH


def _adjoint_times(x: Tensor, w: Tensor) -> Tensor:
    return x.mH @ w


def _differences(values: Tensor) -> Tensor:
    """E_kl = v_l - v_k, and infinity on the diagonal, where a quotient by E has to vanish."""
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    return gaps.masked_fill(torch.eye(values.shape[-1], dtype=torch.bool, device=values.device), INFINITY)


def _pairs_of(primal: Sequence[Tensor], first: Sequence[Any] | None, second: Sequence[Any] | None) -> list[HyperDual]:
    tangents = first if first is not None else [None] * len(primal)
    crosses = second if second is not None else [None] * len(primal)
    return [HyperDual(*parts) for parts in zip(primal, tangents, crosses, strict=True)]


# Inverses and linear systems.


def _inv_ex(op: Any, components: Components, a: HyperDual, *, check_errors: bool = False) -> Any:
    """Y = A^-1: Y_i = -Y A_i Y and Y_c = -Y A_c Y - sum S (Y A_i Y_j + Y A_j Y_i)."""
    y, info = op(a.primal, check_errors=check_errors)

    def step(part: Tensor | None, known: Tensor | None) -> Tensor:
        return _less(None if part is None else -(y @ part @ y), known)

    def products(y_t: Tensor) -> Tensor:
        return components.product(torch.matmul, y @ a.tangent, y_t)

    return HyperDual(y, *_implicit(components, a, step, products)), info


def _system(
    components: Components, a: Any, b: Any, x: Tensor, solve: Callable[[Tensor], Tensor], left: bool,
    shape: Callable[[Tensor], Tensor] = lambda part: part,
) -> HyperDual:  # fmt: skip
    """The components of x in A x = b (x A = b where not ``left``); ``shape`` is what the equation sees of A."""
    a, b = (v if isinstance(v, HyperDual) else HyperDual(v) for v in (a, b))

    def times(a_part: Tensor, x_part: Tensor) -> Tensor:
        return a_part @ x_part if left else x_part @ a_part

    def stack(v: HyperDual, part: Tensor | None) -> Tensor | None:
        return None if part is None else align(part, v.primal, x.ndim)

    def step(a_part: Tensor | None, b_part: Tensor | None, known: Tensor | None) -> Tensor | None:
        moved = None if a_part is None else times(a_part, x)
        right = _less(b_part, add(moved, known))
        return None if right is None else solve(right)

    a_t, a_c = (None if p is None else shape(p) for p in (stack(a, a.tangent), stack(a, a.cross)))
    x_t = step(a_t, stack(b, b.tangent), None)
    if components.second_order is None:
        return HyperDual(x, x_t)
    known = components.product(times, a_t, x_t) if a_t is not None and x_t is not None else None
    return HyperDual(x, x_t, step(a_c, stack(b, b.cross), known))


def _solve_ex(op: Any, components: Components, a: Any, b: Any, *, left: bool = True, check_errors: bool = False) -> Any:
    """A x = b for a matrix or a vector b, with one LU factorisation for the value and every component."""
    (matrix, right), _ = primals((a, b), {})
    is_vector = right.ndim == 1 or (matrix.ndim - 1 == right.ndim and matrix.shape[:-1] == right.shape)
    lu, pivots, info = aten.linalg_lu_factor_ex.default(matrix, check_errors=check_errors)

    def solve(right: Tensor) -> Tensor:
        return aten.linalg_lu_solve.default(lu, pivots, right, left=left)

    def columns(v: Any, change: Callable[[Tensor], Tensor]) -> Any:
        if not is_vector or not isinstance(v, HyperDual):
            return change(v) if is_vector else v
        return HyperDual(*(None if p is None else change(p) for p in (v.primal, v.tangent, v.cross)))

    b = columns(b, lambda p: p.unsqueeze(-1))
    x = _system(components, a, b, solve(b.primal if isinstance(b, HyperDual) else b), solve, left)
    return columns(x, lambda p: p.squeeze(-1)), Undefined(lu), pivots, info


def _solve_triangular(op: Any, components: Components, a: Any, b: Any, *, upper: bool, left: bool = True,
                      unitriangular: bool = False) -> Any:  # fmt: skip
    """A x = b, of whose A only one triangle counts, and its diagonal only where not ``unitriangular``."""
    options = {"upper": upper, "left": left, "unitriangular": unitriangular}
    (matrix, right), _ = primals((a, b), {})

    def triangle(part: Tensor) -> Tensor:
        return part.triu(1 if unitriangular else 0) if upper else part.tril(-1 if unitriangular else 0)

    return _system(components, a, b, op(matrix, right, **options), lambda r: op(matrix, r, **options), left, triangle)


def _triangular_solve(
    b: Tensor, a: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> Any:
    matrix = a.mT if transpose else a
    x = aten.linalg_solve_triangular.default(matrix, b, upper=upper != transpose, unitriangular=unitriangular)
    return x, a.clone()


def _lu_solve(lu: Tensor, pivots: Tensor, b: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor:
    """P L U x = b, or its adjoint, or x P L U = b, by two triangular systems."""
    p, lower, upper = aten.lu_unpack.default(lu, pivots)
    if not left:
        return _lu_solve(lu, pivots, b.mH, adjoint=not adjoint).mH
    solve = aten.linalg_solve_triangular.default
    if adjoint:
        return p @ solve(lower.mH, solve(upper.mH, b, upper=False), upper=True, unitriangular=True)
    return solve(upper, solve(lower, p.mT @ b, upper=False, unitriangular=True), upper=True)


# Cholesky factors.


def _cholesky(components: Components, a: HyperDual, factor: Tensor, upper: bool) -> HyperDual:
    """A = L L^H: L_c = L phi(L^-1 (A_c - sum S (L_i L_j^H + L_j L_i^H)) L^-H).

    phi takes the lower triangle and half of the diagonal.
    """
    lower = factor.mH if upper else factor

    def step(part: Tensor | None, known: Tensor | None) -> Tensor:
        right = _less(None if part is None else _hermitian_part(part), known)
        inner = aten.linalg_solve_triangular.default(lower, right, upper=False)
        inner = aten.linalg_solve_triangular.default(lower.mH, inner, upper=True, left=False)
        return lower @ (inner.tril() - (_diagonal(inner) / 2).diag_embed())

    first, second = _implicit(components, a, step, lambda l_t: components.product(_times_adjoint, l_t, l_t))
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
    inverse = aten.linalg_solve_triangular.default(lower, _identity(lower), upper=False)
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
        g = _less(part, product)
        inner = q.mH @ g
        w = right_solve(inner[..., :size])
        turn = w.tril(-1) - w.tril(-1).mH
        if w.is_complex():
            turn = turn + torch.complex(torch.zeros_like(_diagonal(w).real), _diagonal(w).imag).diag_embed()
        if gram is not None:
            turn = turn - gram.triu(1) - (_diagonal(gram) / 2).diag_embed()
        r_part = inner - turn @ r
        return (q @ turn if rows <= columns else right_solve(g - q @ r_part)), r_part

    def products(first: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q_t, r_t = first
        return components.product(torch.matmul, q_t, r_t), components.product(_adjoint_times, q_t, q_t)

    q_dual, r_dual = _pairs_of((q, r), *_implicit(components, a, step, products))
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
        g = _less(None if part is None else permuted(part), known)
        inner = solve(lower_square, g[..., :size, :], upper=False, unitriangular=True)
        m = solve(upper_square, inner[..., :size], upper=True, left=False)
        l_part = lower_square @ m.tril(-1)
        if not tall:
            return l_part, inner - m.tril(-1) @ upper
        u_part = m.triu() @ upper
        below = solve(upper_square, (g - lower @ u_part)[..., size:, :], upper=True, left=False)
        return torch.cat([l_part, below], -2), u_part

    return _implicit(components, a, step, lambda first: components.product(torch.matmul, *first))


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
    return (p, *_pairs_of((lower, upper), *parts))


def _lu_unpack(op: Any, components: Components, lu: HyperDual, pivots: Any, unpack_data: bool = True,
               unpack_pivots: bool = True) -> Any:  # fmt: skip
    """L and U are the two triangles, the first with a diagonal of ones."""
    p, lower, upper = op(lu.primal, pivots, unpack_data, unpack_pivots)
    if not unpack_data:
        return p, lower, upper
    size = lower.shape[-1]
    parts = (None if x is None else (x[..., :size].tril(-1), x[..., :size, :].triu()) for x in (lu.tangent, lu.cross))
    return (p, *_pairs_of((lower, upper), *parts))


def _reflectors(a: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """V and T of a product of reflections 1 - tau v v^H: it is 1 - V T V^H with T = (1 + D triu(V^H V, 1))^-1 D."""
    k = tau.shape[-1]
    v = a[..., :k].tril(-1) + torch.eye(a.shape[-2], k, dtype=a.dtype, device=a.device)
    above = _identity(v) + tau.unsqueeze(-1) * (v.mH @ v).triu(1)
    return v, aten.linalg_solve_triangular.default(above, tau.diag_embed(), upper=True, unitriangular=True)


def _householder_product(a: Tensor, tau: Tensor) -> Tensor:
    v, t = _reflectors(a, tau)
    rows, columns = a.shape[-2:]
    return torch.eye(rows, columns, dtype=a.dtype, device=a.device) - v @ (t @ v[..., :columns, :].mH)


def _ormqr(a: Tensor, tau: Tensor, other: Tensor, left: bool = True, transpose: bool = False) -> Tensor:
    v, t = _reflectors(a, tau)
    t = t.mH if transpose else t
    return other - (v @ (t @ (v.mH @ other)) if left else ((other @ v) @ t) @ v.mH)


# Eigenvalues and singular values. Equal ones have vectors without derivative: the quotients are then infinite.


def _eigen(
    components: Components, a: HyperDual, values: Tensor, vectors: Tensor, *, hermitian: bool
) -> list[HyperDual]:
    """A V = V D: with Q = V^-1 (A_c V + sum S (A_i V_j - V_i D_j + ..)), D_c is its diagonal and V_c = V (Q / E + ..).

    The columns of V keep the length one, which fixes the real part of the diagonal of V^-1 V_c; the imaginary part is
    a choice of phase, and zero for Hermitian matrices.
    """
    gaps = _differences(values)
    factors = () if hermitian else aten.linalg_lu_factor_ex.default(vectors)[:2]

    def cast(part: Tensor) -> Tensor:
        return _hermitian_part(part) if hermitian else part.to(vectors.dtype)

    def left_solve(x: Tensor) -> Tensor:
        return vectors.mH @ x if hermitian else aten.linalg_lu_solve.default(*factors, x)

    def step(part: Tensor | None, known: Any) -> tuple[Tensor, Tensor]:
        moved, lengths = known or (None, None)
        right = add(None if part is None else cast(part) @ vectors, moved)
        assert right is not None
        q = left_solve(right)
        diagonal = _diagonal(q).real if hermitian else _diagonal(q)
        v_part = vectors @ (q / gaps)
        stretch = None if hermitian else (vectors.conj() * v_part).sum(-2).real
        stretch = add(stretch, None if lengths is None else lengths / 2)
        return diagonal, v_part if stretch is None else v_part - vectors * stretch.unsqueeze(-2)

    def products(first: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        d_t, v_t = first
        moved = components.product(torch.matmul, cast(a.tangent), v_t)
        moved = moved - components.product(lambda v, d: v * d.unsqueeze(-2), v_t, d_t)
        return moved, components.product(lambda x, w: (x.conj() * w).sum(-2).real, v_t, v_t)

    return _pairs_of((values, vectors), *_implicit(components, a, step, products))


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
    gaps = _differences(s) * (across + down)

    def step(part: Tensor | None, known: Any) -> tuple[Tensor, Tensor, Tensor]:
        product, u_gram, v_gram = known or (None, None, None)
        g = _less(part, product)
        gv, gu = g @ v, g.mH @ u
        w = u.mH @ gv
        if u_gram is not None and v_gram is not None:
            w = w + (u_gram * across + down * v_gram) / 2
        u_turn = (w * across + down * w.mH) / gaps
        v_turn = (down * w + w.mH * across) / gaps
        if w.is_complex():
            phase = torch.complex(torch.zeros_like(_diagonal(w).real), _diagonal(w).imag / (2 * s)).diag_embed()
            u_turn, v_turn = u_turn + phase, v_turn - phase
        if u_gram is not None and v_gram is not None:
            u_turn, v_turn = u_turn - u_gram / 2, v_turn - v_gram / 2
        return side(u, u_turn, gv), _diagonal(w).real, side(v, v_turn, gu)

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
        return product, components.product(_adjoint_times, u_t, u_t), components.product(_adjoint_times, v_t, v_t)

    first, second = _implicit(components, a, step, products)
    u_dual, s_dual, v_dual = _pairs_of((u, s, v), first, second)
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
        between = components.product(_adjoint_times, u.tangent, w_t)
        w_c = add(w_c, -(u.primal @ between) - w @ components.product(_adjoint_times, w_t, w_t) / 2)
    parts = [
        None if left is None or right is None else torch.cat([left, right], -1)
        for left, right in ((u.tangent, w_t), (u.cross, w_c))
    ]
    return HyperDual(torch.cat([u.primal, w], -1), *parts)


# Determinants.


def _slogdet(op: Any, components: Components, a: HyperDual) -> Any:
    """l = log det A: l_i = tr(B_i) and l_c = tr(A^-1 A_c) - sum S tr(B_i B_j) with B_i = A^-1 A_i.

    log|det| is its real part, and the sign of a complex determinant is exp(i Im l).
    """
    sign, logabsdet, lu, pivots = op(a.primal)
    factors, swaps, _ = aten.linalg_lu_factor_ex.default(a.primal)

    def solved(part: Tensor) -> Tensor:
        return aten.linalg_lu_solve.default(factors, swaps, part)

    b = None if a.tangent is None else solved(a.tangent)
    first = None if b is None else _trace(b)
    second = None
    if components.second_order is not None:
        known = None if b is None else components.product(lambda x, w: (x * w.mT).sum((-2, -1)), b, b) / 2
        second = _less(None if a.cross is None else _trace(solved(a.cross)), known)
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
        return phase * (_diagonal(p) * (before * after)).sum(-1)

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
            return ((_diagonal(p).unsqueeze(-1) * _diagonal(q).unsqueeze(-2) - p * q.mT) * weights).sum((-2, -1))

        known = phase * components.product(minors, p_t, p_t)
    second = add(None if a.cross is None else linear(inner(a.cross)), known)
    return HyperDual(y, first, second), Undefined(lu), pivots


# Functions of a matrix.


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


# Distances.


def _p_distance(difference: Tensor, p: float) -> Tensor:
    if 0 in difference.shape:  # PyTorch's norm of order infinity refuses no points as it does no coordinates
        return difference.sum(-1)
    return aten.linalg_vector_norm.default(difference, p, [-1])


def _cdist(x: Tensor, w: Tensor, p: float, compute_mode: int | None) -> Tensor:
    return _p_distance(x.unsqueeze(-2) - w.unsqueeze(-3), p)


def _pdist(x: Tensor, p: float = 2.0) -> Tensor:
    rows, columns = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device)
    return _p_distance(x.index_select(0, rows) - x.index_select(0, columns), p)


def _tensorinv(a: Tensor, ind: int = 2) -> Tensor:
    rows, columns = a.shape[:ind], a.shape[ind:]
    return aten.linalg_inv.default(a.reshape(math.prod(rows), math.prod(columns))).reshape(*columns, *rows)


def _refused(name: str, instead: str) -> Rule:
    def rule(op: Any, components: Components, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedOpError(f"PyTorch defines no derivative of {name}; use {instead}")

    rule.kind = "refused"  # type: ignore[attr-defined]
    return rule


RULES: dict[Any, Rule] = {
    aten.linalg_inv_ex.default: _inv_ex,
    aten._linalg_solve_ex.default: _solve_ex,
    aten.linalg_solve_triangular.default: _solve_triangular,
    aten.linalg_cholesky_ex.default: _cholesky_ex,
    aten.linalg_qr.default: _qr,
    aten.linalg_lu_factor_ex.default: _lu_factor_ex,
    aten.linalg_lu.default: _lu,
    aten.lu_unpack.default: _lu_unpack,
    aten._linalg_eigh.default: _eigh,
    aten.linalg_eig.default: _eig,
    aten._linalg_svd.default: _svd,
    aten._linalg_slogdet.default: _slogdet,
    aten._linalg_det.default: _det,
    aten.linalg_matrix_exp.default: _matrix_exp,
    aten.linalg_pinv.atol_rtol_tensor: from_jvp(_pinv),
}
if hasattr(aten, "cholesky"):  # until torch 2.13
    RULES[aten.cholesky.default] = _cholesky_plain

#: Operators that are other ones, kept whole by capture so that their checks do not break the graph.
COMPOSITES: dict[Any, Callable[..., Any]] = {
    aten.linalg_inv.default: lambda a: aten.linalg_inv_ex.default(a, check_errors=True)[0],
    aten.inverse.default: lambda a: aten.linalg_inv_ex.default(a, check_errors=True)[0],
    aten.linalg_solve.default: lambda a, b, *, left=True: aten._linalg_solve_ex.default(
        a, b, left=left, check_errors=True
    )[0],
    aten.linalg_solve_ex.default: lambda a, b, *, left=True, check_errors=False: aten._linalg_solve_ex.default(
        a, b, left=left, check_errors=check_errors
    )[::3],
    aten.linalg_cholesky.default: lambda a, *, upper=False: aten.linalg_cholesky_ex.default(
        a, upper=upper, check_errors=True
    )[0],
    aten.linalg_lu_factor.default: lambda a, *, pivot=True: aten.linalg_lu_factor_ex.default(
        a, pivot=pivot, check_errors=True
    )[:2],
    aten.linalg_tensorinv.default: _tensorinv,
    aten.linalg_eigvals.default: lambda a: aten.linalg_eig.default(a)[0],
    aten._linalg_eigvals.default: lambda a: aten.linalg_eig.default(a)[0],
    aten.lu_solve.default: lambda b, lu, pivots: aten.linalg_lu_solve.default(lu, pivots, b),
    aten.linalg_lu_solve.default: _lu_solve,
    aten.triangular_solve.default: _triangular_solve,
    aten.cholesky_solve.default: _cholesky_solve,
    aten.cholesky_inverse.default: _cholesky_inverse,
    aten.linalg_householder_product.default: _householder_product,
    aten.ormqr.default: _ormqr,
    aten._cdist_forward.default: _cdist,
    aten._pdist_forward.default: _pdist,
    aten._euclidean_dist.default: lambda x, w: _cdist(x, w, 2.0, None),
}
REFUSED: dict[Any, Rule] = {
    aten.geqrf.default: _refused("geqrf's compact form", "torch.linalg.qr"),
    aten.linalg_ldl_factor.default: _refused("an LDL factorisation", "torch.linalg.cholesky or torch.linalg.lu"),
    aten.linalg_ldl_factor_ex.default: _refused("an LDL factorisation", "torch.linalg.cholesky or torch.linalg.lu"),
    aten.linalg_ldl_solve.default: _refused("ldl_solve", "torch.linalg.solve"),
}
for op, rule in REFUSED.items():
    register(op, rule)
for op, rule in RULES.items():
    register(op, rule, "linear algebra")
for op, body in COMPOSITES.items():
    register(op, Composite(body))
