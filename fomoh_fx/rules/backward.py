"""Operators that a derivative taken inside a model leaves in its graph, and that PyTorch differentiates no further.

Most backwards are decomposed, or get a rule synthesised. The linear ones here are linear in the gradient from above;
what they were given besides serves for its shape, or decides where something goes, which has no derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual, primal_of
from fomoh_fx.rules.linalg.distances import pairs_of
from fomoh_fx.rules.linear import linear
from fomoh_fx.rules.registry import Composite, Rule, register

aten = torch.ops.aten


def linear_in_gradient() -> Rule:
    """The rule of a backward that is linear in its first argument, and whose derivative in all others is zero."""
    through = linear()

    def rule(op: Callable[..., Any], components: Components, gradient: Any, *args: Any, **kwargs: Any) -> Any:
        others, options = primal_of(args), primal_of(kwargs)
        if isinstance(gradient, HyperDual):
            return through(op, components, gradient, *others, **options)
        return op(gradient, *others, **options)

    rule.kind = "linear"  # type: ignore[attr-defined]
    return rule


register(
    [
        aten.avg_pool2d_backward.default, aten.avg_pool3d_backward.default,
        aten._adaptive_avg_pool2d_backward.default, aten._adaptive_avg_pool3d_backward.default,
        aten.reflection_pad1d_backward.default, aten.reflection_pad2d_backward.default,
        aten.reflection_pad3d_backward.default,
        aten.replication_pad1d_backward.default, aten.replication_pad2d_backward.default,
        aten.replication_pad3d_backward.default,
        aten.hardshrink_backward.default, aten.softshrink_backward.default,
    ],
    linear_in_gradient(),
)  # fmt: skip


def _log_sigmoid_backward(gradient: Tensor, x: Tensor, _buffer: Tensor) -> Tensor:
    """From x alone: the buffer, which only the CPU's forward fills, has no derivative."""
    return gradient * (-x).sigmoid()


register(aten.log_sigmoid_backward.default, Composite(_log_sigmoid_backward))


def _distance_slopes(gradient: Tensor, difference: Tensor, distance: Tensor, p: float) -> Tensor:
    """The gradient in the difference [.., M] through its p-norm, the distance [..]; zero where that is zero."""
    gradient, distance = gradient.unsqueeze(-1), distance.unsqueeze(-1)
    sign = difference.sign()
    if p == 0:
        return gradient * torch.zeros_like(sign)
    if p == 1:
        return gradient * sign
    if p == math.inf:
        return gradient * sign * (difference.abs() == distance)
    flat = distance == 0
    ratio = difference / torch.where(flat, 1.0, distance)
    if p == 2:
        return torch.where(flat, 0.0, gradient * ratio)
    flat = flat | (difference == 0)
    return torch.where(flat, 0.0, gradient * sign * torch.where(flat, 1.0, ratio.abs()) ** (p - 1))


def _cdist_backward(gradient: Tensor, x: Tensor, w: Tensor, p: float, distance: Tensor) -> Tensor:
    return _distance_slopes(gradient, x.unsqueeze(-2) - w.unsqueeze(-3), distance, p).sum(-2)


def _pdist_backward(gradient: Tensor, x: Tensor, p: float, distance: Tensor) -> Tensor:
    rows, columns = pairs_of(x)
    slopes = _distance_slopes(gradient, x.index_select(0, rows) - x.index_select(0, columns), distance, p)
    return torch.zeros_like(x).index_add(0, rows, slopes).index_add(0, columns, -slopes)


register(aten._cdist_backward.default, Composite(_cdist_backward))
register(aten._pdist_backward.default, Composite(_pdist_backward))


def _zero_tangent(tangent: Tensor, x: Tensor, *, self_num_batch_dims: int = 0) -> Tensor:
    """Zeros in which forward mode keeps a tangent of x."""
    return tangent.new_zeros(*tangent.shape[:self_num_batch_dims], *x.shape)


register(aten._new_zeros_with_same_feature_meta.default, Composite(_zero_tangent))
