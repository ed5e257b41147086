"""Selections: each output element is one of the input's, so a component is selected as the primal was.

The primal runs once and its indices, or its comparisons, serve every component. At ties the choice is reverse mode's:
the extreme value of all elements shares equally, one along a dimension takes the index that it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.rules.indexing import gathered, over_stack
from fomoh_fx.rules.joint import chosen
from fomoh_fx.rules.linear import jointly, linear
from fomoh_fx.rules.registry import Rule, register
from fomoh_fx.rules.stacking import align, axis, bind, primals

aten = torch.ops.aten
Part = Tensor | None


def selection(select: Callable[..., Tensor]) -> Rule:
    """The rule of an operator that returns ``(values, indices)``.

    Args:
        select: ``select(part, values, indices, *args)`` takes the elements at the indices from a stack of components;
            ``args`` are all arguments of the operator's schema.
    """

    def rule(op: Callable[..., Any], components: Components, x: HyperDual, *args: Any, **kwargs: Any) -> Any:
        plain, options = primals((x, *args), kwargs)
        values, indices = op(*plain, **options)
        bound = bind(op, plain, options)

        def through(part: Part) -> Part:
            return None if part is None else select(part, values, indices, *bound)

        return HyperDual(values, through(x.tangent), through(x.cross)), indices

    rule.kind = "selection"  # type: ignore[attr-defined]
    return rule


def _along(dim: int, keepdim: int | None = None) -> Callable[..., Tensor]:
    """Gather along the dimension at position ``dim`` of the arguments: one element, many where ``keepdim`` is None."""

    def select(part: Tensor, values: Tensor, indices: Tensor, x: Tensor, *args: Any) -> Tensor:
        d = args[dim - 1]
        if keepdim is None or args[keepdim - 1] or x.ndim == 0:
            return gathered(part, d, indices)
        return gathered(part, d, indices.unsqueeze(d)).squeeze(axis(d, x))

    return select


def _in_plane(spatial: int) -> Callable[..., Tensor]:
    """Gather at positions that count through the last ``spatial`` dimensions (pooling)."""

    def select(part: Tensor, values: Tensor, indices: Tensor, *_: Any) -> Tensor:
        where = over_stack(indices.flatten(-spatial), part.shape[0])
        return part.flatten(-spatial).gather(-1, where).reshape(part.shape[0], *values.shape)

    return select


ALONG = {
    (1, 2): [aten.max.dim, aten.min.dim, aten.median.dim, aten.nanmedian.dim, aten.mode.default],
    (2, 3): [aten.kthvalue.default],
    (1, None): [aten.sort.default, aten.cummax.default, aten.cummin.default],
    (2, None): [aten.sort.stable, aten.topk.default],
}

IN_PLANE = {
    2: [aten.max_pool2d_with_indices.default, aten.adaptive_max_pool2d.default, aten.fractional_max_pool2d.default],
    3: [aten.max_pool3d_with_indices.default, aten.adaptive_max_pool3d.default, aten.fractional_max_pool3d.default],
}

for (dim, keepdim), ops in ALONG.items():
    register(ops, selection(_along(dim, keepdim)))
for spatial, ops in IN_PLANE.items():
    register(ops, selection(_in_plane(spatial)))


def _unpool(spatial: int) -> Rule:
    """Max-unpooling is linear in the values: the components are more samples of one batch, at the same positions."""

    def stacked(op: Any, part: Tensor, x: Tensor, indices: Tensor, *sizes: Any) -> Tensor:
        values = part.flatten(0, -spatial - 2)
        where = indices.expand(part.shape[0], *indices.shape).reshape(values.shape)
        out = op(values, where, *sizes)
        return out.reshape(*part.shape[:-spatial], *out.shape[-spatial:])

    return linear(stacked)


register(aten.max_unpool2d.default, _unpool(2))
register(aten.max_unpool3d.default, _unpool(3))


# Extreme values that share equally among the elements that attain them.


def shared(part: Tensor, attains: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """The mean of the components over the elements that attain a value; ``dims`` count from the right."""
    total = aten.where.ScalarOther(attains, part, 0.0)
    return total.sum(dims, keepdim) / attains.sum(dims, keepdim) if dims else total


def _median(op: Any, components: Components, x: HyperDual) -> HyperDual:
    """The median of all elements; several equal to it share, as in reverse mode."""
    y = op(x.primal)
    attains = x.primal == y
    dims = list(range(-x.primal.ndim, 0))

    def through(part: Part) -> Part:
        return None if part is None else shared(part, attains, dims, False)

    return HyperDual(y, through(x.tangent), through(x.cross))


def _aminmax(op: Any, components: Components, x: HyperDual, *, dim: int | None = None, keepdim: bool = False) -> Any:
    found = op(x.primal, dim=dim, keepdim=keepdim)
    rank = x.primal.ndim
    dims = list(range(-rank, 0)) if dim is None else [dim % rank - rank] if rank else []

    def extreme(y: Tensor) -> HyperDual:
        restored = y if keepdim or dim is None or not rank else y.unsqueeze(dim)
        attains = x.primal == restored
        parts = [None if p is None else shared(p, attains, dims, keepdim) for p in (x.tangent, x.cross)]
        return HyperDual(y, *parts)

    return tuple(extreme(y) for y in found)


register([aten.median.default, aten.nanmedian.default], _median, "selection")
register(aten.aminmax.default, _aminmax, "selection")


# Choices between two or three operands.


def _choice(takes: Callable[[Tensor, Tensor], Tensor], share: bool) -> Rule:
    """The rule of y = a where ``takes(a, b)`` holds and b elsewhere; equal operands share half each if ``share``."""

    def form(parts: list[Part], y: Tensor, a: Tensor, b: Tensor) -> Part:
        left, right = (None if p is None else align(p, v, y.ndim) for p, v in zip(parts, (a, b), strict=True))
        one = chosen(takes(a, b), left, right)
        if not share or one is None:
            return one
        both = add(left, right)
        assert both is not None
        return torch.where(a == b, both * 0.5, one)

    return jointly(form, kind="selection")


register(aten.maximum.default, _choice(torch.gt, share=True))
register(aten.minimum.default, _choice(torch.lt, share=True))
register(aten.fmax.default, _choice(lambda a, b: (a >= b) | b.isnan(), share=False))
register(aten.fmin.default, _choice(lambda a, b: (a <= b) | b.isnan(), share=False))


def _clamped(parts: list[Part], y: Tensor, x: Tensor, low: Any = None, high: Any = None) -> Part:
    """x's component where low <= x <= high, and a bound's where that bound is the value; at a bound x's."""
    bounds = (x, low, high)
    inside, under, over = (None if p is None else align(p, v, y.ndim) for p, v in zip(parts, bounds, strict=True))
    result: Part = None
    if inside is not None:
        between = x >= low if low is not None else x <= high
        between = between & (x <= high) if low is not None and high is not None else between
        result = aten.where.ScalarOther(between, inside, 0.0)
    if under is not None:
        below = x < low if high is None else (x < low) & (low < high)
        result = chosen(below, under, result)
    if over is not None:
        above = x > high if low is None else (x > high) | (high < low)
        result = chosen(above, over, result)
    return result


_CLAMPS = {
    aten.clamp.default: ((0,), lambda p, y, *args: _clamped([p[0], None, None], y, *args)),
    aten.clamp.Tensor: ((0, 1, 2), _clamped),
    aten.clamp_min.default: ((0,), lambda p, y, x, low: _clamped([p[0], None, None], y, x, low)),
    aten.clamp_min.Tensor: ((0, 1), lambda p, y, x, low: _clamped([*p, None], y, x, low)),
    aten.clamp_max.default: ((0,), lambda p, y, x, high: _clamped([p[0], None, None], y, x, None, high)),
    aten.clamp_max.Tensor: ((0, 1), lambda p, y, x, high: _clamped([p[0], None, p[1]], y, x, None, high)),
}
for op, (positions, form) in _CLAMPS.items():
    register(op, jointly(form, positions, "selection"))
