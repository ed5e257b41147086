"""Elementwise rules: every row at ordinary and special points, its dtype, its accuracy in float32, its code."""

import math
import subprocess
import sys
from collections.abc import Sequence

import mpmath
import pytest
import sympy
import torch
from torch import Tensor
from torch.nn import functional as F

import fomoh_fx
from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.rules.derivation import Formula, derive
from fomoh_fx.rules.registry import RULES
from tests.oracle import reverse_over_reverse
from tests.rules.checking import Sample, check

aten = torch.ops.aten
inf, nan = math.inf, math.nan


#: Reverse mode has no derivative of it: :func:`test_the_value_of_a_step_at_zero_has_a_derivative`.
TESTED_OTHERWISE = [aten.heaviside.default]

GENERATOR = torch.Generator().manual_seed(0)


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


def t(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def z(*values: complex) -> Tensor:
    return torch.tensor(values, dtype=torch.complex128)


def at(*values: float, **options) -> Sample:
    return Sample((t(*values),), **options)


ANY = at(-2.3, -0.7, 0.4, 1.9)
POSITIVE = at(0.2, 0.9, 1.7, 5.1)
UNIT = at(-0.9, -0.3, 0.2, 0.8)
COMPLEX = Sample((z(0.3 + 0.8j, -1.2 + 0.5j, 0.7 - 0.4j),), name="complex")
ROWS_2D = Sample((r(3, 4).T,), name="not contiguous")
NUMBER = Sample((torch.tensor(0.3, dtype=torch.float64),), name="0-dim")

UNARY = {
    aten.square.default: [ANY, at(0.0, name="zero"), COMPLEX, ROWS_2D, NUMBER],
    aten.sqrt.default: [POSITIVE, COMPLEX],
    aten.rsqrt.default: [POSITIVE, COMPLEX],
    aten.reciprocal.default: [ANY, COMPLEX],
    aten.exp.default: [ANY, COMPLEX, ROWS_2D, NUMBER],
    aten.exp2.default: [ANY],
    aten.expm1.default: [ANY, at(0.0, name="zero")],
    aten.log.default: [POSITIVE, COMPLEX],
    aten.log2.default: [POSITIVE],
    aten.log10.default: [POSITIVE],
    aten.log1p.default: [POSITIVE, at(-0.5, 0.0, name="zero")],
    aten.logit.default: [
        at(0.1, 0.6, 0.9),
        Sample((t(0.05, 0.3, 0.99), 0.1), name="clamped"),
        Sample((t(0.1, 0.9), 0.1), name="at the clamp"),
    ],
    aten.sin.default: [ANY, COMPLEX],
    aten.cos.default: [ANY, COMPLEX],
    aten.tan.default: [ANY, COMPLEX],
    aten.asin.default: [UNIT, COMPLEX],
    aten.acos.default: [UNIT, COMPLEX],
    aten.atan.default: [ANY, COMPLEX],
    aten.sinh.default: [ANY, COMPLEX],
    aten.cosh.default: [ANY, COMPLEX],
    aten.tanh.default: [ANY, COMPLEX, ROWS_2D, NUMBER],
    aten.asinh.default: [ANY, COMPLEX],
    aten.acosh.default: [at(1.1, 2.0, 7.0)],
    aten.atanh.default: [UNIT, COMPLEX],
    aten.sinc.default: [
        ANY,
        at(0.1, -0.12499, 0.12501, 1.0, name="series"),
        at(0.0, 1e-3, truth="difference", name="zero"),
    ],
    aten.sigmoid.default: [ANY, at(-40.0, 40.0, name="saturated")],
    aten.log_sigmoid.default: [ANY, at(-40.0, 40.0, name="saturated")],
    aten.log_sigmoid_forward.default: [at(-2.3, 0.4, 40.0, outputs=[0])],
    aten.silu.default: [ANY, at(-40.0, 0.0, 40.0, name="saturated")],
    aten.mish.default: [ANY, at(-40.0, 0.0, 40.0, name="saturated")],
    aten.gelu.default: [
        ANY,
        at(-40.0, 0.0, 40.0, name="saturated"),
        Sample((t(-2.3, -0.7, 0.4, 1.9),), {"approximate": "tanh"}),
        Sample((t(-40.0, 0.0, 40.0),), {"approximate": "tanh"}, name="tanh, saturated"),
    ],
    aten.softplus.default: [
        ANY,
        Sample((t(-2.0, 0.3, 6.0), 2.5, 10.0), name="options"),
        at(25.0, 20.5, name="threshold"),
    ],
    aten.elu.default: [ANY, Sample((t(-2.0, 0.0, 0.3), 1.3, 0.7, 2.1), name="options"), at(0.0, name="kink")],
    aten.celu.default: [ANY, Sample((t(-2.0, 0.0, 0.3), 1.25), name="options")],
    aten.leaky_relu.default: [ANY, Sample((t(-2.0, 0.0, 0.3), 0.2), name="options")],
    aten.hardswish.default: [ANY, at(-3.0, 3.0, -4.0, 4.0, name="kinks")],
    aten.hardsigmoid.default: [at(-2.3, 0.4, -4.0, 4.0, truth="difference")],
    aten.relu.default: [ANY, at(0.0, name="kink"), NUMBER],
    aten.relu6.default: [ANY, at(0.0, 6.0, 7.0, name="kinks")],
    aten.threshold.default: [Sample((t(-2.0, 0.5, 0.7), 0.5, 3.0))],
    aten.hardtanh.default: [ANY, at(-1.0, 1.0, name="kinks"), Sample((t(-2.0, 0.5, 2.0, 3.0), -1.5, 2.0))],
    aten.hardshrink.default: [ANY, at(-0.5, 0.0, 0.5, name="kinks"), Sample((t(-2.0, 0.2, 0.1), 0.1))],
    aten.softshrink.default: [ANY, at(-0.5, 0.0, 0.5, name="kinks"), Sample((t(-2.0, 0.2, 0.1), 0.1))],
    aten.nan_to_num.default: [ANY, Sample((t(nan, inf, -inf, 1.0), 3.0, 2.0, -2.0), name="not finite")],
    aten.erf.default: [ANY],
    aten.erfc.default: [ANY],
    aten.erfinv.default: [UNIT],
    aten.special_erfcx.default: [ANY],
    aten.special_ndtr.default: [ANY],
    aten.special_log_ndtr.default: [ANY, at(-20.0, 20.0, name="tails")],
    aten.special_ndtri.default: [at(0.1, 0.6, 0.9)],
    aten.special_entr.default: [POSITIVE],
    aten.lgamma.default: [POSITIVE, at(-0.7, -2.3, name="negative")],
    aten.digamma.default: [POSITIVE, at(-0.7, -2.3, name="negative")],
    aten.polygamma.default: [Sample((n, t(0.2, 0.9, 5.1))) for n in (0, 1, 2)],
    aten.mvlgamma.default: [Sample((t(2.2, 3.7), 3)), Sample((t(0.4), 1))],
    aten.i0.default: [ANY, at(0.0, name="zero")],
    aten.special_i0e.default: [ANY, at(0.0, name="zero")],
    aten.special_i1.default: [ANY, at(0.0, name="zero")],
    aten.special_i1e.default: [ANY, at(0.0, name="zero")],
    **{
        getattr(aten, f"special_{name}").default: [
            at(-2.3, -0.7, 0.4, 1.9, truth="difference"),
            at(0.0, 0.98, 1.02, 30.0, truth="difference", name="zero, and where the series ends"),
        ]
        for name in ("bessel_j0", "bessel_j1", "modified_bessel_i0", "modified_bessel_i1", "spherical_bessel_j0")
    },
    **{
        getattr(aten, f"special_{name}").default: [at(0.2, 0.9, 1.7, 5.7, truth="difference")]
        for name in (
            "bessel_y0",
            "bessel_y1",
            "modified_bessel_k0",
            "modified_bessel_k1",
            "scaled_modified_bessel_k0",
            "scaled_modified_bessel_k1",
        )
    },
    aten.neg.default: [ANY, COMPLEX],
    aten.positive.default: [ANY],
    aten.abs.default: [ANY, at(0.0, name="kink")],
    aten.frac.default: [ANY],
    aten.deg2rad.default: [ANY],
    aten.rad2deg.default: [ANY],
    aten.frexp.Tensor: [ANY],
}

X, W = t(-1.3, 0.4, 2.2), t(0.7, 1.9, -0.6)
P, Q = t(0.3, 1.4, 2.2), t(0.7, 1.9, 0.6)
COLUMN, ROW = r(3, 1), r(4)
SCALAR = torch.tensor(1.7, dtype=torch.float64)


def pairs(x: Tensor = X, w: Tensor = W, **kwargs) -> list[Sample]:
    """Every active subset, broadcasting, and a 0-dim tensor."""
    low, high = x.min(), x.max()
    column, row = low + (high - low) * torch.rand(3, 1, dtype=torch.float64, generator=GENERATOR), w[:2]
    return [
        Sample((x, w), kwargs),
        Sample((x, w), kwargs, active=[0], name="first"),
        Sample((x, w), kwargs, active=[1], name="second"),
        Sample((column, row), kwargs, name="broadcast"),
        Sample((x, w[0]), kwargs, name="0-dim second"),
        Sample((x[0], w), kwargs, name="0-dim first"),
    ]


NOISE = torch.zeros(3, dtype=torch.float64)
INTEGERS = torch.tensor([2, 3, 1])
BINARY = {
    aten.add.Tensor: [*pairs(), *pairs(alpha=2.5), *pairs(alpha=3)[:1], Sample((X, 2.5), name="number")],
    aten.add.Scalar: [Sample((X, 2.5)), Sample((X, 2, 3))],
    aten.sub.Tensor: [*pairs(), *pairs(alpha=2.5), Sample((X, INTEGERS), name="integers")],
    aten.sub.Scalar: [Sample((X, 2.5)), Sample((X, 2, 3))],
    aten.rsub.Tensor: [*pairs(), *pairs(alpha=2.5)],
    aten.rsub.Scalar: [Sample((X, 2.5)), Sample((X, 2, 0.3))],
    aten.mul.Tensor: [
        *pairs(),
        Sample((X, 2.3), name="number"),
        Sample((X, 1), name="one"),
        Sample((X, 0), name="zero"),
        Sample((X, INTEGERS), name="integers"),
        Sample((COLUMN, ROW), name="both broadcast"),
        Sample((SCALAR, SCALAR), name="both 0-dim"),
        Sample((z(0.3 + 0.8j, 1.2), z(1.1 - 0.5j, 0.2j)), name="complex"),
        Sample((z(0.3 + 0.8j, 1.2), t(1.1, 0.2)), active=[0], name="complex and real"),
    ],
    aten.mul.Scalar: [Sample((X, 2.3)), Sample((X, -1))],
    aten.div.Tensor: [*pairs(), Sample((X, 2.3), name="number"), Sample((X, INTEGERS), name="integers")],
    aten.div.Scalar: [Sample((X, 2.3)), Sample((X, 4))],
    aten.pow.Tensor_Scalar: [
        *(Sample((X, n), name=f"{n}") for n in (0, 1, 2, 3, -1, -2, 2.0)),
        *(Sample((P, n), name=f"positive, {n}") for n in (0.5, -0.5, 1.5, 2.3, -0.7)),
        *(Sample((t(0.0, 1.0), n), name=f"zero, {n}") for n in (0, 1, 2, 3, 2.3)),
        Sample((z(0.3 + 0.8j, 1.2), 3), name="complex"),
        Sample((z(0.3 + 0.8j, 1.2), 2.3), name="complex, 2.3"),
    ],
    aten.pow.Tensor_Tensor: [
        *pairs(P, W),
        Sample((X, t(2.0, 3.0, 0.0)), active=[0], name="negative base"),
        Sample((X, INTEGERS), name="integers"),
        Sample((t(0.0, 0.0, 0.0), t(1.0, 2.0, 3.0)), active=[0], name="zero base"),
        Sample((t(-1.0, 2.0), t(0.0, 0.0)), active=[0], name="zero exponent"),
        Sample((z(0.3 + 0.8j, 1.2), z(1.1 - 0.5j, 0.2j)), name="complex"),
    ],
    aten.pow.Scalar: [Sample((n, X), name=f"{n}") for n in (2, 2.3, 1, 0.5)],
    aten.float_power.Tensor_Scalar: [Sample((X, 3)), Sample((P, 2.3)), Sample((t(0.0), 2), name="zero")],
    aten.float_power.Tensor_Tensor: pairs(P, W),
    aten.float_power.Scalar: [Sample((2.3, X))],
    aten.ldexp.Tensor: [*pairs(), Sample((X, INTEGERS), name="integers")],
    aten.hypot.default: pairs(),
    aten.atan2.default: [*pairs(), Sample((t(0.0), t(-1.0)), name="on the cut")],
    aten.logaddexp.default: [*pairs(), Sample((t(200.0, 0.0), t(-800.0, 0.0)), name="large", active=[0])],
    aten.logaddexp2.default: pairs(),
    aten.xlogy.Tensor: [
        *pairs(X, Q),
        Sample((t(0.0, 0.0), t(2.0, 1.0)), name="zero"),
        Sample((t(0.0), t(0.0)), active=[0], name="both zero"),
        Sample((INTEGERS, Q), name="integers"),
    ],
    aten.xlogy.Scalar_Other: [Sample((X, 2.3)), Sample((X, 2))],
    aten.xlogy.Scalar_Self: [Sample((2.3, Q)), Sample((0, Q), name="zero")],
    aten.special_xlog1py.default: [*pairs(X, Q), Sample((t(0.0), t(-1.0)), active=[0], name="both zero")],
    aten.special_xlog1py.other_scalar: [Sample((X, 2.3))],
    aten.special_xlog1py.self_scalar: [Sample((2.3, Q))],
    aten.special_zeta.default: [Sample((t(1.5, 2.2), t(0.7, 3.0)), active=[1])],
    aten.special_zeta.self_scalar: [Sample((2.5, t(0.7, 3.0)))],
    **{
        op: samples
        for packet in (aten.special_hermite_polynomial_h, aten.special_hermite_polynomial_he)
        for op, samples in {
            packet.default: [
                *(Sample((X, t(*n)), active=[0], truth="difference") for n in ((0.0, 1.0, 2.0), (3.0, 8.0, 4.0))),
                Sample((X, t(2.7, 3.3, 1.4)), truth="difference", name="fractions"),
                Sample((X, t(-1.6, -0.7, 0.6)), truth="difference", name="constant"),
                Sample((COLUMN, torch.tensor([0, 1, 5])), truth="difference", name="integers, broadcast"),
            ],
            packet.n_scalar: [Sample((X, n), truth="difference", name=f"{n}") for n in (-1, 0, 1, 2, 7, 3.5, 4.7)],
            packet.x_scalar: [Sample((2.3, t(1.3, 4.6)), truth="difference")],
        }.items()
    },
    aten.igamma.default: [Sample((P, Q), active=[1])],
    aten.igammac.default: [Sample((P, Q), active=[1])],
    aten.copysign.Tensor: pairs(),
    aten.copysign.Scalar: [Sample((X, -2.0))],
    aten.fmod.Tensor: [*pairs(), Sample((t(4.0), t(2.0)), name="multiple")],
    aten.fmod.Scalar: [Sample((X, 0.7))],
    aten.remainder.Tensor: [*pairs(), Sample((t(4.0), t(2.0)), name="multiple")],
    aten.remainder.Scalar: [Sample((X, 0.7))],
    aten.remainder.Scalar_Tensor: [Sample((2.3, W), truth="difference")],
    aten._prelu_kernel.default: [*pairs()[:5], Sample((t(0.0, -1.0), t(0.2, 0.3)), name="kink")],
    aten.glu.default: [Sample((r(3, 4), dim)) for dim in (1, -1)],
    aten.rrelu_with_noise_functional.default: [Sample((X, NOISE, 0.1, 0.3, False), active=[0], outputs=[0])],
}
SAMPLES = {**UNARY, **BINARY}
CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)])
def test_rule(op, sample, second_order):
    check(op, sample, second_order)


def expanded(op, *args, directions: int = 1, active: Sequence[int] | None = None, **kwargs) -> HyperDual:
    """The rule applied to arguments of which the active (floating-point tensors, all for None) move along ones."""
    floats = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()]
    duals = list(args)
    for i in floats if active is None else [floats[a] for a in active]:
        duals[i] = HyperDual(args[i], torch.ones(directions, *args[i].shape, dtype=args[i].dtype))
    result = RULES[op](op, Components(directions, "plane"), *duals, **kwargs)
    return result[0] if isinstance(result, tuple) else result


def slope_and_curvature(op, x: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    result = expanded(op, x, **kwargs)
    return tuple(torch.zeros_like(x) if p is None else p.expand(1, *x.shape)[0] for p in (result.tangent, result.cross))


# Special points, where reverse-over-reverse gives a NaN or a value that depends on the order.


@pytest.mark.parametrize(
    ("op", "x", "slope", "curvature"),
    [
        (aten.sinc.default, 0.0, 0.0, -(math.pi**2) / 3),
        (aten.sqrt.default, 0.0, inf, -inf),
        (aten.special_entr.default, 0.0, inf, -inf),
        (aten.i0.default, 0.0, 0.0, 0.5),
        (aten.special_i1.default, 0.0, 0.5, 0.0),
        (aten.special_modified_bessel_i0.default, 0.0, 0.0, 0.5),
        (aten.special_modified_bessel_i1.default, 0.0, 0.5, 0.0),
        (aten.special_bessel_j0.default, 0.0, 0.0, -0.5),
        (aten.special_bessel_j1.default, 0.0, 0.5, 0.0),
        (aten.special_bessel_y0.default, 0.0, inf, -inf),
        (aten.special_bessel_y1.default, 0.0, inf, -inf),
        (aten.special_modified_bessel_k0.default, 0.0, -inf, inf),
        (aten.special_modified_bessel_k1.default, 0.0, -inf, inf),
        (aten.special_scaled_modified_bessel_k0.default, 0.0, -inf, inf),
        (aten.special_scaled_modified_bessel_k1.default, 0.0, -inf, inf),
        (aten.special_scaled_modified_bessel_k1.default, inf, 0.0, 0.0),
        (aten.special_spherical_bessel_j0.default, 0.0, 0.0, -1 / 3),
        (aten.logit.default, 0.0, inf, -inf),
        (aten.hardsigmoid.default, 3.0, 0.0, 0.0),
        (aten.hardsigmoid.default, -3.0, 0.0, 0.0),
    ],
)
def test_special_points(op, x, slope, curvature):
    found = slope_and_curvature(op, t(x))
    assert [float(f) for f in found] == [slope, pytest.approx(curvature)]


# Functions that PyTorch cannot differentiate, against mpmath.

BESSEL = {
    aten.special_bessel_j0.default: lambda x: mpmath.besselj(0, x),
    aten.special_bessel_j1.default: lambda x: mpmath.besselj(1, x),
    aten.special_bessel_y0.default: lambda x: mpmath.bessely(0, x),
    aten.special_bessel_y1.default: lambda x: mpmath.bessely(1, x),
    aten.special_modified_bessel_i0.default: lambda x: mpmath.besseli(0, x),
    aten.special_modified_bessel_i1.default: lambda x: mpmath.besseli(1, x),
    aten.special_modified_bessel_k0.default: lambda x: mpmath.besselk(0, x),
    aten.special_modified_bessel_k1.default: lambda x: mpmath.besselk(1, x),
    aten.special_scaled_modified_bessel_k0.default: lambda x: mpmath.exp(x) * mpmath.besselk(0, x),
    aten.special_scaled_modified_bessel_k1.default: lambda x: mpmath.exp(x) * mpmath.besselk(1, x),
    aten.special_spherical_bessel_j0.default: mpmath.sinc,
}


def exact(function, x: float, order: int) -> float:
    with mpmath.workdps(40):
        return float(mpmath.diff(function, mpmath.mpf(x), order, h=mpmath.mpf(10) ** -10 * x))


@pytest.mark.parametrize(("op", "function"), BESSEL.items(), ids=map(str, BESSEL))
def test_bessel_functions(op, function):
    """Where PyTorch's own J and Y have all digits: see test_upstream.py."""
    points = [1e-3, 0.99, 1.4, 1.6, 33.0]
    found = slope_and_curvature(op, t(*points))
    for order, values in enumerate(found, 1):
        assert values.tolist() == pytest.approx([exact(function, x, order) for x in points], rel=3e-14, abs=0)


@pytest.mark.parametrize(
    ("degree", "dtype"),
    [*((n, torch.float32) for n in (0, 1, 2, 5, 12, 25)), *((n, torch.float64) for n in (3, 60, 200))],
)
@pytest.mark.parametrize(
    ("op", "polynomial"),
    [
        (aten.special_hermite_polynomial_h.default, sympy.hermite_poly),
        (aten.special_hermite_polynomial_he.default, sympy.hermite_prob_poly),
    ],
    ids=["h", "he"],
)
def test_hermite_polynomials(op, polynomial, degree, dtype):
    """Errors are a few roundings of the value, and of the argument times the next derivative."""
    x = t(-3.1, 1e-3, 0.7, 9.0, dtype=dtype)
    found = expanded(op, x, torch.full_like(x, degree), active=[0])
    p, truths = polynomial(degree, sympy.Symbol("x"), polys=True), []
    for _ in range(4):
        truths.append(t(*(float(p.eval(sympy.Rational(float(point)))) for point in x)))
        p = p.diff()
    for order, part in enumerate([found.primal, found.tangent[0], found.cross[0]]):
        scale = truths[order].abs() + (x * truths[order + 1]).abs()
        assert (part - truths[order]).abs().le(16 * torch.finfo(dtype).eps * scale).all()


def second_derivatives(op, x: float, w: float) -> tuple[list[float], list[float]]:
    """(f_x, f_w) and (f_xx, f_xw, f_ww): the components along the two axes."""
    axes = [HyperDual(t(x), t(1.0, 0.0)[:, None]), HyperDual(t(w), t(0.0, 1.0)[:, None])]
    result = RULES[op](op, Components(2, "plane"), *axes)
    return result.tangent.flatten().tolist(), result.cross.flatten().tolist() if result.cross is not None else None


@pytest.mark.parametrize(
    ("op", "x", "w", "first", "second"),
    [
        (aten.pow.Tensor_Tensor, 0.0, 2.0, [0.0, 0.0], [2.0, 0.0, 0.0]),
        (aten.pow.Tensor_Tensor, 0.0, 3.0, [0.0, 0.0], [0.0, 0.0, 0.0]),
        (aten.pow.Tensor_Tensor, 0.0, 1.0, [1.0, 0.0], [0.0, 1.0, 0.0]),
        (aten.pow.Tensor_Tensor, 2.0, 0.0, [0.0, math.log(2)], [0.0, 0.5, math.log(2) ** 2]),
        (aten.atan2.default, 0.0, 0.0, [0.0, 0.0], [0.0, 0.0, 0.0]),
        (aten.copysign.Tensor, 0.0, -1.0, [0.0, 0.0], None),
        (aten.logaddexp.default, -inf, 0.0, [0.0, 1.0], [0.0, 0.0, 0.0]),
        (aten.logaddexp.default, 200.0, -800.0, [1.0, 0.0], [0.0, 0.0, 0.0]),
    ],
)
def test_special_points_of_two_arguments(op, x, w, first, second):
    found = second_derivatives(op, x, w)
    assert found[0] == pytest.approx(first)
    assert found[1] == pytest.approx(second)


def test_random_slopes_are_shared():
    """rrelu in training draws once: every component has the primal's slopes."""
    x = t(-1.3, 0.4, -2.2)
    result = expanded(
        aten.rrelu_with_noise_functional.default, x, torch.zeros(3, dtype=x.dtype), 0.1, 0.9, True, active=[0]
    )
    torch.testing.assert_close(result.tangent[0], result.primal / x)
    assert result.cross is None


def test_power_of_zero():
    """0 ** x has derivative zero, as in reverse mode."""
    result = expanded(aten.pow.Scalar, 0.0, t(0.0, 1.0, 2.0))
    assert result.tangent.tolist() == [[0.0, 0.0, 0.0]] and result.cross.tolist() == [[0.0, 0.0, 0.0]]


# Symbolic zeros and ones: what need not be computed is not.


def test_structural_zeros():
    assert expanded(aten.relu.default, t(1.0)).cross is None
    assert expanded(aten.add.Tensor, t(1.0), 2.0).cross is None
    x = HyperDual(t(1.0, 2.0), t(3.0, 4.0)[None])
    added = RULES[aten.add.Tensor](aten.add.Tensor, Components(1, "plane"), x, 2.3)
    assert added.tangent is x.tangent
    nothing = RULES[aten.pow.Tensor_Scalar](aten.pow.Tensor_Scalar, Components(1, "plane"), x, 0)
    assert not nothing.active


@pytest.mark.parametrize(
    ("op", "slope", "curvature"),
    [
        (aten.mul.Tensor, [2.6, -3.0], [2.0, 2.0]),
        (aten.add.Tensor, [2.0, 2.0], None),
        (aten.sub.Tensor, None, None),
    ],
)
def test_same_value_twice(op, slope, curvature):
    """x * x is a function of one argument: one term, not two."""
    x = HyperDual(t(1.3, -1.5), t(1.0, 1.0)[None])
    result = RULES[op](op, Components(1, "plane"), x, x)
    assert result.tangent is None if slope is None else result.tangent[0].tolist() == pytest.approx(slope)
    assert result.cross is None if curvature is None else result.cross[0].tolist() == pytest.approx(curvature)


# Dtypes: components are in the primal's, whatever the operands' are.

NARROW = [(op, s) for op, s in CASES if not any(isinstance(a, Tensor) and a.is_complex() for a in s.args)]
PROMOTING = {aten.float_power.Tensor_Scalar, aten.float_power.Tensor_Tensor, aten.float_power.Scalar}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype):
    for op, sample in NARROW:
        if op not in RULES or dtype == torch.bfloat16 and not _computes(op, sample, dtype):
            continue
        args = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in sample.args]
        result = expanded(op, *args, directions=2, active=sample.active, **sample.kwargs)
        expected = torch.float64 if op in PROMOTING else dtype
        parts = {"primal": result.primal, "tangent": result.tangent, "cross": result.cross}
        found = {name: part.dtype for name, part in parts.items() if part is not None}
        assert set(found.values()) == {expected}, f"{op} {sample.name}: {found}"


def _computes(op, sample: Sample, dtype: torch.dtype) -> bool:
    """Whether PyTorch computes the operator in this dtype at all."""
    try:
        op(
            *(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in sample.args),
            **sample.kwargs,
        )
    except (NotImplementedError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize(
    "op", [aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Tensor, aten.atan2.default]
)
def test_mixed_dtypes(op):
    """A 0-dim float64 tensor does not widen, a float64 tensor widens; nothing is rounded on the way."""
    x, w = t(0.3, 1.7, 2.2), t(1.1, 0.4, 1.9)
    narrow = expanded(op, x.float(), torch.tensor(1.3, dtype=torch.float64), directions=2)
    assert {narrow.primal.dtype, narrow.tangent.dtype} == {torch.float32}
    wide, exact = (expanded(op, a, w, directions=2) for a in (x.float(), x.float().double()))
    assert wide.tangent.dtype == torch.float64
    torch.testing.assert_close(wide.tangent, exact.tangent, rtol=1e-14, atol=0)
    if exact.cross is not None:
        torch.testing.assert_close(wide.cross, exact.cross, rtol=1e-14, atol=0)


def test_python_numbers_stay_exact():
    """A number is used in full precision: log(2.3) as a float64, 1/6 as a float64."""
    power = expanded(aten.pow.Scalar, 2.3, t(1.5))
    assert float(power.tangent) == pytest.approx(2.3**1.5 * math.log(2.3), rel=1e-15)
    assert float(expanded(aten.hardsigmoid.default, t(0.5)).tangent) == 1 / 6


# Accuracy in float32, relative to float64 at the same points.


def _logarithmic(low: float, high: float) -> Tensor:
    return torch.logspace(math.log10(low), math.log10(high), 60, dtype=torch.float64)


def _mirrored(points: Tensor) -> Tensor:
    return torch.cat([-points.flip(0), points])


LINE = _mirrored(_logarithmic(1e-6, 80))
HALF_LINE = _logarithmic(1e-6, 1e6)
INTERVAL = torch.cat([_logarithmic(1e-6, 0.5), 1 - _logarithmic(1e-6, 0.5)])
DOMAINS = {
    **{
        getattr(aten, f).default: HALF_LINE
        for f in ("sqrt", "rsqrt", "log", "log2", "log10", "special_entr", "lgamma", "digamma")
    },
    **{getattr(aten, f).default: _mirrored(INTERVAL) for f in ("asin", "acos", "atanh", "erfinv")},
    **{getattr(aten, f).default: INTERVAL for f in ("logit", "special_ndtri")},
    aten.log1p.default: torch.cat([_logarithmic(1e-6, 0.5) - 1, -_logarithmic(1e-6, 0.5), HALF_LINE]),
    aten.acosh.default: torch.cat([1 + _logarithmic(1e-6, 0.5), _logarithmic(1.5, 1e6)]),
    aten.tan.default: _mirrored(_logarithmic(1e-6, 1.57)),
    **dict.fromkeys((op for op in BESSEL if any(f in str(op) for f in ("_y", "_k"))), _logarithmic(1e-6, 80)),
}
#: Where PyTorch's own backward loses the digits of what decays to zero in the same way.
TAILS = {
    aten.log_sigmoid_forward.default,
    aten.expm1.default, aten.tanh.default, aten.sigmoid.default, aten.log_sigmoid.default, aten.silu.default,
    aten.mish.default, aten.gelu.default, aten.softplus.default, aten.special_erfcx.default,
    aten.special_log_ndtr.default, aten.special_i0e.default, aten.special_i1e.default,
}  # fmt: skip
#: Roundings that differences of nearly equal terms enlarge, as they do in PyTorch's own backward.
ROUNDINGS = {aten.special_erfcx.default: 128, aten.special_log_ndtr.default: 2048, aten.special_ndtri.default: 32}
ON_A_GRID = [op for op, samples in UNARY.items() if op in RULES and len(samples[0].args) == 1]


@pytest.mark.parametrize("op", ON_A_GRID, ids=str)
def test_float32_accuracy(op):
    """Errors are a few roundings of the value, and of the argument times the next derivative."""
    narrow = DOMAINS.get(op, LINE).float()
    x = narrow.double()
    slope, curvature = slope_and_curvature(op, x)
    step = 1e-7 * x.abs()
    inside = DOMAINS.get(op, LINE)
    left, right = (x - step).clamp(inside.min(), inside.max()), (x + step).clamp(inside.min(), inside.max())
    third = (slope_and_curvature(op, right)[1] - slope_and_curvature(op, left)[1]) / (right - left)
    truths, conditions = (slope, curvature), (x * curvature, x * third)
    for truth, condition, found in zip(truths, conditions, slope_and_curvature(op, narrow), strict=True):
        scale = truth.abs() + condition.abs() + (1.0 if op in TAILS else 0.0)
        representable = truth.abs() < torch.finfo(torch.float32).max
        error = ((found.double() - truth).abs() / (scale + torch.finfo(torch.float32).tiny))[representable]
        worst = float(error.max() / torch.finfo(torch.float32).eps)
        assert worst < ROUNDINGS.get(op, 16), f"{op}: {worst:.1f} roundings"


@pytest.mark.parametrize(
    ("op", "kwargs"),
    [(op, {}) for op in sorted(TAILS - {aten.special_erfcx.default}, key=str)]
    + [(aten.gelu.default, {"approximate": "tanh"}), (aten.logit.default, {"eps": 1e-6})],
    ids=str,
)
def test_nothing_overflows(op, kwargs):
    x = torch.tensor([-100.0, -30.0, 30.0, 85.0])
    assert all(f.isfinite().all() for f in slope_and_curvature(op, x, **kwargs))


# No derivative in PyTorch: an error, never zero.


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (torch.special.airy_ai, (0.4,)),
        (lambda x: torch.special.chebyshev_polynomial_t(x, 3), (0.4,)),
        (lambda x: torch.special.zeta(x, 2.0), (1.5,)),
        (torch.special.zeta, (1.5, 2.0)),
        (torch.special.gammainc, (1.5, 2.0)),
        (torch.special.gammaincc, (1.5, 2.0)),
    ],
    ids=[
        "airy_ai",
        "chebyshev",
        "zeta_number",
        "zeta",
        "gammainc",
        "gammaincc",
    ],
)
def test_refused(function, args):
    tensors = [t(a) for a in args]
    with pytest.raises(UnsupportedOpError):
        hd = fomoh_fx.transform(function, wrt="inputs")
        hd(*tensors, tangents=[torch.ones(1, 1, dtype=torch.float64) for _ in args])


def test_error_names_the_argument():
    with pytest.raises(UnsupportedOpError, match="'self'"):
        expanded(aten.igamma.default, t(1.5), t(2.0))


# Derivation.


@pytest.mark.parametrize(
    ("expression", "lines"),
    [
        ("tanh(x)", ["dx = 1 - y**2", "return (dx, -2*dx*y, )"]),
        ("sigmoid(x)", ["dx = y*(1 - y)", "return (dx, dx*(1 - 2*y), )"]),
        ("exp(x)", ["dx = y", "return (dx, y, )"]),
        ("log(x)", ["dx = 1/x", "return (dx, -dx**2, )"]),
        ("sqrt(x)", ["dx = (1/2)/y", "return (dx, -2*dx**3, )"]),
        ("erf(x)", [f"dx = {2 / math.sqrt(math.pi)!r}*torch.exp(-x**2)", "return (dx, -2*dx*x, )"]),
        ("x*floor(x/2)", ["dx = floor((1/2)*x)", "return (dx, )"]),
        ("x*sigmoid(x)", ["t0 = sigmoid(x)", "t1 = 1 - t0", "dx = t0 + t1*y", "return (dx, t1*(dx - t0*y + t0), )"]),
    ],
)
def test_generated_code(expression, lines):
    partials = derive(Formula(expression), (None,), (0,), True)
    assert [line.strip() for line in partials.source.splitlines()[1:]] == lines


def test_import_derives_nothing():
    code = "from fomoh_fx.rules.derivation import derive, parse; print(derive.cache_info(), parse.cache_info())"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.count("currsize=0") == 2


#: Behind a mask, where the slope of the function after it is infinite: there reverse mode has zero, not a NaN.
MASKED = {
    "relu, sqrt": lambda x: x.relu().sqrt(),
    "clamp, sqrt": lambda x: x.clamp(min=0).sqrt(),
    "where, sqrt": lambda x: torch.where(x < 0, 0.0, x).sqrt(),
    "masked_fill, sqrt": lambda x: x.masked_fill(x < 0, 0).sqrt(),
    "pad, sqrt": lambda x: F.pad(x * x, (1, 1)).sqrt(),
    "nodes without edges": lambda x: x.new_zeros(5).index_add(0, torch.tensor([0, 1, 0]), x * x).sqrt(),
    "triangle, power": lambda x: (x.expand(3, 3) ** 2).tril().pow(0.5),
    "relu, power below two": lambda x: x.relu() ** 1.5,
    "relu, powers": lambda x: x.relu() ** torch.tensor([0.5, 0.5, 1.5], dtype=x.dtype),
    "xlogy": lambda x: torch.xlogy(x.relu(), x.relu()),
    "xlog1py": lambda x: torch.special.xlog1py(x.relu(), x.relu() - 1),
    "entr": lambda x: torch.special.entr(x.relu()),
    "hypot": lambda x: torch.hypot(x.relu(), x.relu()),
    "asin": lambda x: x.clamp(-1, 1).asin(),
    "acos": lambda x: x.clamp(-1, 1).acos(),
}


@pytest.mark.parametrize("name", MASKED)
def test_no_nan_behind_a_mask(name):
    def function(x):
        return (MASKED[name](x) * 1.3).sin().sum()

    x = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
    v = torch.tensor([[1.0, 0.5, -2.0], [0.3, -1.0, 1.0]], dtype=torch.float64)
    _, tangent, cross = reverse_over_reverse(function, [x], [v])
    assert cross.isfinite().all()
    out = fomoh_fx.transform(function, wrt="inputs")(x, tangents=(v,))
    torch.testing.assert_close(out.tangent, tangent)
    torch.testing.assert_close(out.hessian(), cross)


@pytest.mark.parametrize(
    "function", [lambda x: F.lp_pool1d(F.relu(-x.abs())[None], 2, 3), lambda x: x.clamp(min=1).acosh()]
)
def test_a_constant_behind_a_mask(function):
    """Where reverse mode has a NaN, at second order at least, though the function does not change."""
    x = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
    out = fomoh_fx.transform(function, wrt="inputs")(x, tangents=(torch.ones(1, 3, dtype=torch.float64),))
    assert not out.tangent.any()
    assert not out.cross.any()


def test_an_infinite_slope_stays():
    x = torch.tensor([0.0, 4.0], dtype=torch.float64)
    out = fomoh_fx.transform(torch.sqrt, wrt="inputs")(x, tangents=(torch.ones(1, 2, dtype=torch.float64),))
    assert out.tangent.tolist() == [[float("inf"), 0.25]]


@pytest.mark.parametrize("number", [lambda m: m.sum().item(), lambda m: 0, lambda m: 0.0, lambda m: 3])
def test_division_by_a_number_that_may_be_zero(number):
    """As for tensors: infinite or undefined, no error of Python."""

    def f(x, m):
        return (x.sin() * m.to(x.dtype)) / number(m)

    x, v = r(3), r(2, 3)
    hd = fomoh_fx.transform(f, wrt="inputs")
    for m in (torch.tensor([1, 0, 1]), torch.tensor([1.0, 0, -1.0]), torch.zeros(3)):
        out = hd(x, m, tangents=(v, None))
        with torch.no_grad():
            value, scale = f(x, m), m.double() / torch.tensor(number(m))
        torch.testing.assert_close(out.primal, value, equal_nan=True)
        torch.testing.assert_close(out.tangent, scale * x.cos() * v, equal_nan=True)
        torch.testing.assert_close(out.hessian(), -scale * x.sin() * v[:, None] * v, equal_nan=True)


def test_the_value_of_a_step_at_zero_has_a_derivative():
    """Reverse mode has none; these are the differences."""
    x, w, v = t(0.0, -1.0, 0.0, 2.0), r(4), r(2, 4)
    out = fomoh_fx.transform(lambda w: torch.heaviside(x, w) ** 2, wrt="inputs")(w, tangents=(v,))
    torch.testing.assert_close(out.tangent, 2 * w * v * (x == 0))
    torch.testing.assert_close(out.hessian(), 2.0 * v[:, None] * v * (x == 0))
