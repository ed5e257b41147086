"""Elementwise operators with an option that chooses the formula, a second output, or a body in terms of others."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual, Undefined
from fomoh_fx.rules.derivation import Formula
from fomoh_fx.rules.elementwise import expand, formula_of
from fomoh_fx.rules.registry import Composite, Rule, register

aten = torch.ops.aten

GELU = {
    "none": Formula("x*(1 + erf(x/sqrt(2)))/2"),
    "tanh": Formula("x*(1 + tanh(sqrt(2/pi)*(x + 0.044715*x**3)))/2"),
}


def _gelu(op: Any, components: Components, x: HyperDual, *, approximate: str = "none") -> HyperDual:
    return expand(GELU[approximate], op, components, op(x.primal, approximate=approximate), [x])


def _log_sigmoid_forward(op: Any, components: Components, x: HyperDual) -> tuple[HyperDual, Undefined]:
    y, buffer = op(x.primal)
    return expand(formula_of(aten.log_sigmoid.default), op, components, y, [x]), Undefined(buffer)


def _logit(op: Any, components: Components, x: HyperDual, eps: float | None = None) -> HyperDual:
    """x is clamped to [eps, 1 - eps]: no derivative outside."""
    y = op(x.primal, eps)
    if eps is not None:
        inside = (x.primal >= eps) & (x.primal <= 1 - eps)
        x = HyperDual(x.primal.clamp(eps, 1 - eps), _where(inside, x.tangent), _where(inside, x.cross))
    return expand(formula_of(aten.logit.default), op, components, y, [x])


def _where(condition: Tensor, part: Tensor | None) -> Tensor | None:
    return None if part is None else torch.where(condition, part, 0.0)


def _rrelu(
    op: Any, components: Components, x: HyperDual, noise: Tensor, lower: Any = 1 / 8, upper: Any = 1 / 3,
    training: bool = False, generator: Any = None,
) -> tuple[HyperDual, Tensor]:  # fmt: skip
    """The primal draws the slopes of the negative side, every component is multiplied by them."""
    y, slopes = op(x.primal, noise, lower, upper, training, generator)
    slope = slopes if training else torch.where(x.primal > 0, torch.ones_like(y), (lower + upper) / 2)
    return HyperDual(y, *(None if p is None else slope * p for p in (x.tangent, x.cross))), slopes


def _frexp(op: Any, components: Components, x: HyperDual) -> tuple[HyperDual, Tensor]:
    """x = mantissa * 2^exponent with a piecewise constant exponent."""
    mantissa, exponent = op(x.primal)
    scale = torch.exp2(-exponent.to(mantissa.dtype))
    return HyperDual(mantissa, *(None if p is None else p * scale for p in (x.tangent, x.cross))), exponent


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    value, gate = torch.chunk(x, 2, dim)
    return value * torch.sigmoid(gate)


def _mvlgamma(x: Tensor, p: int) -> Tensor:
    """log of pi^(p(p-1)/4) prod_j Gamma(x - j/2), j = 0..p-1."""
    shifts = torch.arange(p, dtype=x.dtype, device=x.device) / 2
    return torch.lgamma(x.unsqueeze(-1) - shifts).sum(-1) + p * (p - 1) / 4 * math.log(math.pi)


ELEMENTWISE: dict[Any, Rule] = {
    aten.gelu.default: _gelu,
    aten.log_sigmoid_forward.default: _log_sigmoid_forward,
    aten.logit.default: _logit,
}
for ops, rule in ELEMENTWISE.items():
    register(ops, rule, "elementwise")
register(aten.rrelu_with_noise_functional.default, _rrelu, "linear")
register(aten.frexp.Tensor, _frexp, "linear")
register(aten.glu.default, Composite(_glu))
register(aten.mvlgamma.default, Composite(_mvlgamma))
