"""Random operators and others whose derivative is zero wherever it exists.

One draw per step is shared by all components: the primal draws, and the components use its result (a dropout's mask).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fomoh_fx import operators  # noqa: F401  defines stop_gradient and with_value
from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.rules.linear import constant
from fomoh_fx.rules.registry import register

aten = torch.ops.aten

#: New values that depend on an argument's shape only.
SHAPES = [
    aten.full_like, aten.zeros_like, aten.ones_like, aten.empty_like, aten.rand_like, aten.randn_like, aten.randint_like,
    aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.new_empty_strided, aten.scalar_tensor,
]  # fmt: skip

#: Piecewise constant values, comparisons, and integer results.
STEPS = [
    aten.sign, aten.sgn.default, aten.round, aten.floor, aten.ceil, aten.trunc, aten.heaviside, aten.floor_divide,
    aten.div.Tensor_mode, aten.div.Scalar_mode, aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.isnan, aten.isinf,
    aten.isfinite, aten.signbit, aten.logical_not, aten.logical_and, aten.logical_or, aten.logical_xor,
    aten.argmax, aten.argmin, aten.argsort, aten.any, aten.all, aten.nonzero, aten.count_nonzero, aten.histc,
    aten.bucketize, aten.searchsorted, aten.bernoulli, aten.multinomial, aten.poisson, aten.isclose, aten.equal,
]  # fmt: skip

for packet in [*SHAPES, *STEPS]:
    register(packet, constant(), "constant")
register(torch.ops.fomoh_fx.stop_gradient.default, constant(), "constant")
register(aten.detach.default, constant(), "constant")


def _native_dropout(op: Any, components: Components, x: HyperDual, p: float, train: bool | None) -> Any:
    """y = x * mask / (1 - p): the primal draws the mask, every component is multiplied by it."""
    y, mask = op(x.primal, p, train)
    if train is False or p == 0:
        return HyperDual(y, x.tangent, x.cross), mask
    scale = mask.to(y.dtype) * (0.0 if p == 1 else 1 / (1 - p))

    def through(part: Tensor | None) -> Tensor | None:
        return None if part is None else part * scale

    return HyperDual(y, through(x.tangent), through(x.cross)), mask


def _with_value(op: Any, components: Components, x: Any, value: Any) -> Any:
    """The value of one argument with the derivative of the other: in-place changes under no_grad."""
    y = value.primal if isinstance(value, HyperDual) else value
    return HyperDual(y, x.tangent, x.cross) if isinstance(x, HyperDual) else y


register(aten.native_dropout.default, _native_dropout, "linear")
register(torch.ops.fomoh_fx.with_value.default, _with_value, "linear")
