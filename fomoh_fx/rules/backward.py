"""Operators that a gradient taken inside a model leaves in its graph, and that PyTorch differentiates no further.

Most backwards are decomposed, or get a rule synthesised. These are linear in the gradient from above, and what they
were given besides serves for its shape, or decides where something goes, which has no derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual, primal_of
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
