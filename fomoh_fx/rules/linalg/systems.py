"""Inverses and linear systems."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual, Undefined, add
from fomoh_fx.rules.linalg.implicit import less, orders
from fomoh_fx.rules.registry import Composite, Rule, register
from fomoh_fx.rules.stacking import align, primals

aten = torch.ops.aten


def _inv_ex(op: Any, components: Components, a: HyperDual, *, check_errors: bool = False) -> Any:
    """Y = A^-1: Y_i = -Y A_i Y and Y_c = -Y A_c Y - sum S (Y A_i Y_j + Y A_j Y_i)."""
    y, info = op(a.primal, check_errors=check_errors)

    def step(part: Tensor | None, known: Tensor | None) -> Tensor:
        return less(None if part is None else -(y @ part @ y), known)

    def products(y_t: Tensor) -> Tensor:
        return components.product(torch.matmul, y @ a.tangent, y_t)

    return HyperDual(y, *orders(components, a, step, products)), info


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
        right = less(b_part, add(moved, known))
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


def _tensorinv(a: Tensor, ind: int = 2) -> Tensor:
    rows, columns = a.shape[:ind], a.shape[ind:]
    return aten.linalg_inv.default(a.reshape(math.prod(rows), math.prod(columns))).reshape(*columns, *rows)


RULES: dict[Any, Rule] = {
    aten.linalg_inv_ex.default: _inv_ex,
    aten._linalg_solve_ex.default: _solve_ex,
    aten.linalg_solve_triangular.default: _solve_triangular,
}

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
    aten.linalg_tensorinv.default: _tensorinv,
    aten.lu_solve.default: lambda b, lu, pivots: aten.linalg_lu_solve.default(lu, pivots, b),
    aten.linalg_lu_solve.default: _lu_solve,
    aten.triangular_solve.default: _triangular_solve,
}
for op, rule in RULES.items():
    register(op, rule, "linear algebra")
for op, body in COMPOSITES.items():
    register(op, Composite(body))
