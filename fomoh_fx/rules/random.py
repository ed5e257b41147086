"""Random operators and others whose derivative is zero wherever it exists.

One draw per step is shared by all components: the primal draws, and the components use its result (a dropout's mask).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fomoh_fx import operators  # noqa: F401  defines stop_gradient and with_value
from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.rules.linear import constant
from fomoh_fx.rules.registry import register, rule_for

aten = torch.ops.aten
Part = Tensor | None

#: New values that depend on an argument's shape only.
SHAPES = [
    aten.full_like.default, aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten.zero.default, aten.fill.Scalar,
]  # fmt: skip

#: Questions about a shape.
SIZES = [aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int, aten.sym_storage_offset.default]

#: Random values; the distribution's parameters have no derivative, as in reverse mode.
DRAWS = [
    aten.rand_like.default, aten.randn_like.default, aten.randint_like.default, aten.randint_like.low_dtype,
    aten.bernoulli.default, aten.bernoulli.p, aten.bernoulli.Tensor, aten.multinomial.default, aten.poisson.default,
    aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor, aten.normal_functional.default,
    aten.uniform.default, aten.exponential.default, aten.geometric.default, aten.cauchy.default,
    aten.log_normal.default,
]  # fmt: skip

#: Piecewise constant values, comparisons, and results that are no floating-point numbers.
STEPS = [
    aten.sign.default, aten.round.default, aten.round.decimals, aten.floor.default, aten.ceil.default,
    aten.trunc.default, aten.floor_divide.default, aten.floor_divide.Scalar,
    aten.signbit.default,
    aten.eq.Tensor, aten.eq.Scalar, aten.ne.Tensor, aten.ne.Scalar, aten.lt.Tensor, aten.lt.Scalar,
    aten.le.Tensor, aten.le.Scalar, aten.gt.Tensor, aten.gt.Scalar, aten.ge.Tensor, aten.ge.Scalar,
    aten.isnan.default, aten.isinf.default, aten.isposinf.default, aten.isneginf.default,
    aten.logical_not.default, aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default,
    aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims,
    aten.argmax.default, aten.argmin.default, aten.nonzero.default, aten.count_nonzero.default,
    aten.count_nonzero.dim_IntList, aten.histc.default, aten.bucketize.Tensor, aten.bucketize.Scalar,
    aten.searchsorted.Tensor, aten.searchsorted.Scalar, aten.equal.default,
]  # fmt: skip

#: Stops: the value without its derivative.
STOPS = [torch.ops.fomoh_fx.stop_gradient.default, aten.detach.default]

for op in [*SHAPES, *SIZES, *DRAWS, *STEPS, *STOPS]:
    register(op, constant(), "constant")


def scaled(y: Tensor, factor: Tensor, x: HyperDual) -> HyperDual:
    """y with the components of x times a factor that does not depend on x."""
    return HyperDual(y, *(None if p is None else p * factor for p in (x.tangent, x.cross)))


def _native_dropout(op: Any, components: Components, x: HyperDual, p: float, train: bool | None) -> Any:
    """y = x * mask / (1 - p): the primal draws the mask, every component is multiplied by it."""
    y, mask = op(x.primal, p, train)
    if train is False or p == 0:
        return HyperDual(y, x.tangent, x.cross), mask
    return scaled(y, mask.to(y.dtype) * (0.0 if p == 1 else 1 / (1 - p)), x), mask


def _rrelu(
    op: Any, components: Components, x: HyperDual, noise: Tensor, lower: float = 1 / 8, upper: float = 1 / 3,
    training: bool = False, generator: Any = None,
) -> Any:  # fmt: skip
    """Negative values times a random slope, which is the second output (one where the value is positive)."""
    y, slopes = op(x.primal, noise, lower, upper, training, generator)
    if training:
        return scaled(y, slopes, x), slopes
    mean = (lower + upper) / 2
    parts = [None if p is None else torch.where(x.primal > 0, p, p * mean) for p in (x.tangent, x.cross)]
    return HyperDual(y, *parts), slopes


def _standard_gamma(op: Any, components: Components, alpha: HyperDual, generator: Any = None) -> HyperDual:
    """The pathwise derivative of a draw; PyTorch knows the first only."""
    if components.second_order is not None:
        raise UnsupportedOpError("the second derivative of a gamma sample is not known: use second_order=None")
    y = op(alpha.primal, generator)
    return HyperDual(y, alpha.tangent * aten._standard_gamma_grad.default(alpha.primal, y))


def _sample_dirichlet(op: Any, components: Components, alpha: HyperDual, generator: Any = None) -> HyperDual:
    """The pathwise derivative of a draw x on the simplex, (1 - x 1^T) diag(d) for PyTorch's d_i = dx_i / dalpha_i."""
    if components.second_order is not None:
        raise UnsupportedOpError("the second derivative of a Dirichlet sample is not known: use second_order=None")
    x = op(alpha.primal, generator)
    total = alpha.primal.sum(-1, True).expand_as(x)
    moved = alpha.tangent * aten._dirichlet_grad.default(x, alpha.primal, total)
    return HyperDual(x, moved - x * moved.sum(-1, True))


def _with_value(op: Any, components: Components, x: Any, value: Any) -> Any:
    """The value of one argument with the derivative of the other: in-place changes under no_grad."""
    y = value.primal if isinstance(value, HyperDual) else value
    return HyperDual(y, x.tangent, x.cross) if isinstance(x, HyperDual) else y


def _divide_in_mode(op: Any, components: Components, x: Any, w: Any, *, rounding_mode: str | None) -> Any:
    """True division without a mode; with one, a step."""
    if rounding_mode is not None:
        return constant()(op, components, x, w, rounding_mode=rounding_mode)
    true = {aten.div.Tensor_mode: aten.div.Tensor, aten.div.Scalar_mode: aten.div.Scalar}[op]
    return rule_for(true)(true, components, x, w)


register(aten.native_dropout.default, _native_dropout, "linear")
register(aten.rrelu_with_noise_functional.default, _rrelu, "linear")
register(aten._standard_gamma.default, _standard_gamma, "random")
register(aten._sample_dirichlet.default, _sample_dirichlet, "random")
register(torch.ops.fomoh_fx.with_value.default, _with_value, "linear")
register([aten.div.Tensor_mode, aten.div.Scalar_mode], _divide_in_mode, "elementwise")
