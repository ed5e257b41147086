"""Complex values and Fourier transforms.

Directions are real-linear: a complex value has components in both its parts. Operators that take a complex value apart
are linear over the reals; the modulus, the direction and the angle of z = s |z| are not holomorphic, and have rules of
their own. With q_i = Re(conj(s) z_i) and r = |z|::

    |z|:   y_i = q_i                     y_ij = Re(conj(s) z_ij) + (Re(conj(z_i) z_j) - q_i q_j) / r
    sgn:   y_i = (z_i - s q_i) / r       y_ij = (z_ij - s q_ij) / r - (q_i y_j + q_j y_i) / r - s Re(conj(y_i) y_j)
    angle: y_i = Im(z_i / z)             y_ij = Im(z_ij / z - z_i z_j / z^2)

(q_ij = Re(conj(s) z_ij)). At z = 0 the derivatives are zero, as in reverse mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.rules.linear import constant, jointly, linear
from fomoh_fx.rules.registry import Composite, Rule, register
from fomoh_fx.rules.stacking import align, axis

aten = torch.ops.aten
Part = Tensor | None


def by_kind(real: Rule, complex_: Rule) -> Rule:
    """One rule for real values and another for complex ones."""

    def rule(op: Any, components: Components, x: HyperDual, *args: Any) -> Any:
        return (complex_ if x.primal.is_complex() else real)(op, components, x, *args)

    rule.kind = "complex"  # type: ignore[attr-defined]
    return rule


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Re(conj(a) b), the inner product over the reals."""
    return a.real * b.real + a.imag * b.imag


def _inner_square(components: Components, z: Tensor) -> Tensor:
    """sum_ij S_c,ij Re(conj(z_i) z_j)."""
    return components.square(torch.view_as_real(z)).sum(-1)


def _inverse(r: Tensor) -> Tensor:
    return torch.where(r == 0, r, 1 / r)


def _real_abs(op: Any, components: Components, x: HyperDual) -> HyperDual:
    """y_i = sign(x) x_i; zero at zero, as in reverse mode."""
    sign = x.primal.sign()
    return HyperDual(op(x.primal), *(None if p is None else sign * p for p in (x.tangent, x.cross)))


def _abs(op: Any, components: Components, z: HyperDual) -> HyperDual:
    y = op(z.primal)
    s = z.primal.sgn()
    tangent = None if z.tangent is None else inner(s, z.tangent)
    cross = None
    if components.second_order is not None:
        cross = None if z.cross is None else inner(s, z.cross)
        if tangent is not None:
            cross = add(cross, (_inner_square(components, z.tangent) - components.square(tangent)) * _inverse(y))
    return HyperDual(y, tangent, cross)


def _sgn(op: Any, components: Components, z: HyperDual) -> HyperDual:
    s = op(z.primal)
    inverse = _inverse(z.primal.abs())

    def first(part: Part) -> Part:
        return None if part is None else (part - s * inner(s, part)) * inverse

    tangent, cross = first(z.tangent), None
    if components.second_order is not None:
        cross = first(z.cross)
        if tangent is not None:
            radial = inner(s, z.tangent) * inverse
            turned = components.product(torch.mul, tangent, radial) + s * _inner_square(components, tangent)
            cross = -turned if cross is None else cross - turned
    return HyperDual(s, tangent, cross)


def _angle(op: Any, components: Components, z: HyperDual) -> HyperDual:
    y = op(z.primal)
    inverse = torch.where(z.primal == 0, z.primal, 1 / z.primal)
    relative = [None if p is None else p * inverse for p in (z.tangent, z.cross)]
    tangent = None if relative[0] is None else relative[0].imag
    cross = None
    if components.second_order is not None:
        cross = relative[1]
        if relative[0] is not None:
            cross = add(cross, -components.square(relative[0]))
        cross = None if cross is None else cross.imag
    return HyperDual(y, tangent, cross)


def _complex(parts: list[Part], y: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    a, b = (None if p is None else align(p, v, y.ndim) for p, v in zip(parts, (real, imaginary), strict=True))
    if b is None:
        assert a is not None
        return a.to(y.dtype)
    return b * 1j if a is None else aten.complex.default(a, b)


def _fourier(op: Any, part: Tensor, x: Tensor, dims: Any, *args: Any) -> Tensor:
    """The stack is one more batch dimension."""
    return op(part, [axis(d, x) for d in dims], *args)


def _viewed(op: Any, part: Tensor, *_: Any) -> Tensor:
    """A pair of numbers is the last dimension, so a stack is viewed like one value; it must lie close in memory."""
    return op(part.contiguous())


#: Operators that take a complex value apart or put it together, linear over the reals.
PARTS = [aten.view_as_real.default, aten._conj_physical.default]

register(PARTS, linear(lambda op, part, *_: op(part)))
register(
    aten._conj.default, linear(lambda op, part, *_: aten._conj_physical.default(part))
)  # no lazy views of components
register(aten._neg_view.default, linear(lambda op, part, *_: -part))
register(aten.view_as_complex.default, linear(_viewed))
register([aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default], linear(_fourier))
register(aten.complex.default, jointly(_complex))
register(aten.polar.default, Composite(lambda r, angle: aten.complex.default(r * angle.cos(), r * angle.sin())))
register(aten.abs.default, by_kind(_real_abs, _abs))
register(aten.sgn.default, by_kind(constant(), _sgn))
register(aten.angle.default, by_kind(constant(), _angle))
