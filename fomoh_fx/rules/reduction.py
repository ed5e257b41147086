"""Reductions: extreme values, variances and norms over some dimensions.

Dimensions are counted from the right, where a value and its stacked components agree. A formula takes
``(components, x, y, *options)`` with the options of the operator's schema and returns the components of y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.rules.registry import Composite, Rule, register, rule_for
from fomoh_fx.rules.stacking import bind

aten = torch.ops.aten
Part = Tensor | None
Dims = int | Sequence[int] | None


def from_right(x: Tensor, dims: Dims = None) -> list[int]:
    """The dimensions of x as negative numbers; all of them for None or an empty list."""
    chosen = [dims] if isinstance(dims, int) else list(dims or range(x.ndim))
    return [d if d < 0 else d - x.ndim for d in chosen]


def restored(y: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    """A reduced value with its reduced dimensions back, of size one."""
    rank = y.ndim + len(dims)
    for d in () if keepdim else sorted(d + rank for d in dims):
        y = y.unsqueeze(d)
    return y


def each(function: Callable[[Tensor], Tensor], x: HyperDual) -> tuple[Part, Part]:
    """A linear function of the tangent and of the cross component."""
    return tuple(None if part is None else function(part) for part in (x.tangent, x.cross))  # type: ignore[return-value]


def reduction(formula: Callable[..., Any], kind: str = "reduction") -> Rule:
    """The rule of an operator along dimensions; a number is taken as a vector of one, so that dimension -1 exists."""

    def rule(op: Any, components: Components, x: HyperDual, *args: Any, **kwargs: Any) -> Any:
        if x.primal.ndim == 0:  # no dimension to name; PyTorch's own logsumexp refuses that of a vector
            args = tuple([0] if isinstance(a, (list, tuple)) and not a else a for a in args)
        options = bind(op, (x, *args), kwargs)[1:]
        if x.primal.ndim > 0:
            return formula(components, x, op(x.primal, *args, **kwargs), *options)
        vector = HyperDual(x.primal.reshape(1), *each(lambda part: part.reshape(-1, 1), x))
        result = formula(components, vector, op(vector.primal, *args, **kwargs), *options)
        return pytree.tree_map(_as_number, result, is_leaf=lambda y: isinstance(y, HyperDual))

    rule.kind = kind  # type: ignore[attr-defined]
    return rule


def _as_number(y: HyperDual) -> HyperDual:
    return HyperDual(y.primal.reshape(()), *each(lambda part: part.reshape(-1), y))


def _extreme(components: Components, x: HyperDual, y: Tensor, dims: Dims = None, keepdim: bool = False) -> HyperDual:
    """The mean of the components over the elements that attain the extreme value."""
    over = from_right(x.primal, dims)
    attained = x.primal == restored(y, over, keepdim)
    count = attained.sum(over, keepdim)
    return HyperDual(y, *each(lambda p: aten.where.ScalarOther(attained, p, 0.0).sum(over, keepdim) / count, x))


def _mean(x: HyperDual, primal: Tensor, over: list[int], keepdim: bool) -> HyperDual:
    return HyperDual(primal, *each(lambda p: p.mean(over, keepdim), x))


def _variance(
    components: Components, x: HyperDual, primal: Tensor, over: list[int], correction: Any, keepdim: bool
) -> HyperDual:
    """y = sum |u|^2 / n, u = x - mean(x): y_i = 2 sum u u_i / n and y_c = 2 (sum u u_c + sum_ij S_c,ij u_i u_j) / n."""
    count = math.prod(x.primal.shape[d] for d in over)
    half = torch.sym_max(count - (1 if correction is None else correction), 0) / 2

    def centred(part: Tensor) -> Tensor:
        return part - part.mean(over, True)

    u, (u_tangent, u_cross) = centred(x.primal), each(centred, x)
    tangent = None if u_tangent is None else _inner(u, u_tangent).sum(over, keepdim) / half
    second = None if u_cross is None else _inner(u, u_cross)
    if u_tangent is not None and components.second_order is not None:
        second = add(second, squared(components, u_tangent))
    return HyperDual(primal, tangent, None if second is None else second.sum(over, keepdim) / half)


def _inner(x: Tensor, w: Tensor) -> Tensor:
    """Re(conj(x) w)."""
    return (x.conj() * w).real if x.is_complex() else x * w


def squared(components: Components, x: Tensor) -> Tensor:
    """sum_ij S_c,ij Re(conj(x_i) x_j)."""
    return components.square(x.real) + components.square(x.imag) if x.is_complex() else components.square(x)


def _root(components: Components, variance: HyperDual, y: Tensor) -> HyperDual:
    """y = sqrt(v): y_i = v_i / 2y, y_c = (v_c - 2 sum_ij S_c,ij y_i y_j) / 2y, and no derivative where y = 0."""
    slope = aten.where.ScalarOther(y != 0, 0.5 / y, 0.0)
    tangent = None if variance.tangent is None else variance.tangent * slope
    second = variance.cross
    if tangent is not None and components.second_order is not None:
        second = add(second, -2 * components.square(tangent))
    return HyperDual(y, tangent, None if second is None else second * slope)


def _var(components: Components, x: HyperDual, y: Tensor, dims: Dims, correction: Any, keepdim: bool) -> HyperDual:
    return _variance(components, x, y, from_right(x.primal, dims), correction, keepdim)


def _std(components: Components, x: HyperDual, y: Tensor, *options: Any) -> HyperDual:
    return _root(components, _var(components, x, y, *options), y)


def _var_mean(
    components: Components, x: HyperDual, y: tuple[Tensor, Tensor], dims: Dims, correction: Any, keepdim: bool
) -> tuple[HyperDual, HyperDual]:
    over = from_right(x.primal, dims)
    return _variance(components, x, y[0], over, correction, keepdim), _mean(x, y[1], over, keepdim)


def _std_mean(
    components: Components, x: HyperDual, y: tuple[Tensor, Tensor], *options: Any
) -> tuple[HyperDual, HyperDual]:
    variance, mean = _var_mean(components, x, y, *options)
    return _root(components, variance, y[0]), mean


def _vector_norm(
    components: Components, x: HyperDual, y: Tensor, order: Any, dims: Dims, keepdim: bool, dtype: torch.dtype | None
) -> HyperDual:
    """y = (sum |x|^p)^(1/p), and with r = x / y, a = sgn(r) |r|^(p-1):

    y_i = sum a x_i and y_c = sum a x_c + (p-1)/y (sum_ij S_c,ij (sum |r|^(p-2) x_i x_j - y_i y_j)).

    p = 0 counts, p = 1 and infinity are piecewise linear. Where y = 0 there is no derivative, and for p < 1 none in an
    element that is 0.
    """
    if order == 0:
        return HyperDual(y)
    over = from_right(x.primal, dims)
    if dtype is not None:
        x = HyperDual(x.primal.to(dtype), *each(lambda p: p.to(dtype), x))
    if x.primal.is_complex() and order != 2:
        x = rule_for(aten.abs.default)(aten.abs.default, components, x)
    value = restored(y, over, keepdim)
    slope, curvature = _norm_weights(x.primal, value, order, over)
    tangent, first = each(lambda p: _inner(slope, p).sum(over, True), x)
    cross = first
    if tangent is not None and components.second_order is not None and order not in (1, math.inf, -math.inf):
        within = squared(components, x.tangent)
        within = within if curvature is None else within * curvature
        slack = within.sum(over, True) - components.square(tangent)
        cross = add(first, slack * aten.where.ScalarOther(value != 0, (order - 1) / value, 0.0))
    return HyperDual(y, *each(lambda p: p if keepdim else p.squeeze(over), HyperDual(y, tangent, cross)))


def _norm_weights(x: Tensor, y: Tensor, order: float, over: list[int]) -> tuple[Tensor, Part]:
    """a, and |r|^(p-2) or None for one; the elements that attain an infinite norm share equally."""
    if order == 1:
        return x.sgn(), None
    if math.isinf(order):
        attained = x.abs() == y
        return x.sgn() * attained / attained.sum(over, True), None
    r = aten.where.ScalarOther(y != 0, x / y, 0.0)
    if order == 2:
        return r, None
    smooth = r != 0 if order < 1 else y != 0
    size = r.abs()
    slope, curvature = r.sgn() * size ** (order - 1), size ** (order - 2)
    return aten.where.ScalarOther(smooth, slope, 0.0), aten.where.ScalarOther(smooth, curvature, 0.0)


def _norm(x: Tensor, order: Any = 2, dims: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return aten.linalg_vector_norm.default(x, 2 if order is None else order, dims or None, keepdim, dtype=dtype)


def _norm_with_dtype(x: Tensor, order: Any, *, dtype: Any) -> Tensor:
    return _norm(x, order, dtype=dtype)


def _dist(x: Tensor, other: Tensor, order: Any = 2) -> Tensor:
    return aten.linalg_vector_norm.default(x - other, order)


register([aten.amax.default, aten.amin.default, aten.max.default, aten.min.default], reduction(_extreme, "selection"))
FORMULAS: dict[Any, Callable[..., Any]] = {
    aten.var.correction: _var,
    aten.std.correction: _std,
    aten.var_mean.correction: _var_mean,
    aten.std_mean.correction: _std_mean,
    aten.linalg_vector_norm.default: _vector_norm,
}
for ops, formula in FORMULAS.items():
    register(ops, reduction(formula))
register([aten.norm.Scalar, aten.norm.ScalarOpt_dim, aten.norm.ScalarOpt_dim_dtype], Composite(_norm))
register(aten.norm.ScalarOpt_dtype, Composite(_norm_with_dtype))
register(aten.dist.default, Composite(_dist))
