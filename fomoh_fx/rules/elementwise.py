"""Elementwise operators: one sympy expression each, from which f' and f'' are derived.

For y = f(a, b, ..): y_i = sum_a f_a a_i and y_c = sum_a f_a a_c + sum_ab f_ab [S_c applied to a_i b_j].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.rules.derivation import Formula, derive, validate
from fomoh_fx.rules.functions import ARGUMENTS
from fomoh_fx.rules.registry import Rule, register
from fomoh_fx.rules.stacking import align, arguments_of, bind, primals

aten = torch.ops.aten


def elementwise(
    expression: str, *, first: str | tuple[str | None, ...] | None = None, second: str | tuple[str, ...] | None = None
) -> Rule:
    """The rule of an operator that computes ``expression`` in each element.

    Args:
        expression: in sympy's syntax; x, w, v and u are the operator's first to fourth argument.
        first: f_x, f_w, .. given by hand, in terms of the arguments and of the output y, where the derived form would
            overflow or cancel; None for an argument in which no derivative exists.
        second: f_xx, f_xw, .., f_ww, .. likewise, in terms of the first derivatives dx, dw, .. as well.

    Raises:
        ArgumentError: an expression cannot be parsed, or has a symbol or a function that nobody knows.
    """
    firsts = (first,) if isinstance(first, str) else first
    seconds = (second,) if isinstance(second, str) else second
    validate(Formula(expression, firsts, seconds))
    return served(Formula(expression, firsts, seconds))


def served(formula: Formula) -> Rule:
    """The rule of a formula."""

    def rule(op: Callable[..., Tensor], components: Components, *args: Any, **kwargs: Any) -> HyperDual:
        plain, options = primals(args, kwargs)
        y = op(*plain, **options)
        return expand(formula, op, components, y, bind(op, args, kwargs))

    rule.kind = "elementwise"  # type: ignore[attr-defined]
    rule.formula = formula  # type: ignore[attr-defined]
    return rule


def expand(formula: Formula, op: Any, components: Components, y: Tensor, operands: list[Any]) -> HyperDual:
    """The components of y, the value of the formula at the operands."""
    active = tuple(n for n, a in enumerate(operands) if isinstance(a, HyperDual))
    for n in active:
        if not formula.has_derivative(n):
            raise UnsupportedOpError(f"no derivative in its argument {arguments_of(op)[n].name!r} is known")
    operands = [_like(y, a) for a in operands[: formula.arity]]
    known = tuple(_known(formula, operands, n) for n in range(formula.arity))
    active = tuple(n for n in active if not isinstance(known[n], str))
    second = components.second_order is not None and any(operands[n].tangent is not None for n in active)
    partials = derive(formula, known, active, second)
    values = [a.primal if isinstance(a, HyperDual) else a for a in operands]
    partial = dict(zip(partials.wanted, partials.run(*values, y), strict=True))

    def of(n: int, part: str) -> Tensor | None:
        stacked = getattr(operands[n], part)
        return None if stacked is None else align(stacked, operands[n].primal, y.ndim)

    times = _steep_times if formula.steep and not any(map(_is_smooth_power, known[1:])) else _times
    tangents = {n: of(n, "tangent") for n in active}
    tangent = add(*(times(partial.get((n,)), tangents[n]) for n in active))
    cross = None
    if components.second_order is not None:
        cross = add(*(times(partial.get((n,)), of(n, "cross")) for n in active))
        for n, m in (pair for pair in partials.wanted if len(pair) == 2):
            x, w = tangents[n], tangents[m]
            if x is not None and w is not None:
                pairs = components.square(x) if n == m else components.product(torch.mul, x, w)
                cross = add(cross, times(partial[n, m], pairs))
    return HyperDual(y, tangent, cross)


def _like(y: Tensor, operand: Any) -> Any:
    """The operand in the output's dtype, to which PyTorch promotes it before it computes."""
    if isinstance(operand, HyperDual):
        parts = (None if part is None else part.to(y.dtype) for part in (operand.tangent, operand.cross))
        return operand if operand.primal.dtype == y.dtype else HyperDual(operand.primal.to(y.dtype), *parts)
    return operand.to(y.dtype) if isinstance(operand, Tensor) and operand.dtype != y.dtype else operand


def _known(formula: Formula, operands: list[Any], n: int) -> Any:
    """What is known of an argument before it is differentiated.

    A whole or half number (an exponent) simplifies the derivatives; x * x is a function of one argument.
    """
    value = operands[n]
    if isinstance(value, HyperDual):
        return next((ARGUMENTS[m] for m in range(n) if operands[m] is value and formula.first is None), None)
    return value if type(value) in (int, float) and abs(value) < 1e6 and value * 2 == int(value * 2) else None


def _times(factor: Any, component: Tensor | None) -> Tensor | None:
    """factor * component, where the symbolic zero absorbs and one is not multiplied by."""
    if factor is None or component is None:
        return None
    if isinstance(factor, (int, float)):  # not a number that is known at run time only
        return component if factor == 1 else -component if factor == -1 else component * factor
    return factor * component


def _steep_times(factor: Any, component: Tensor | None) -> Tensor | None:
    """The same, and zero where the component is zero, whatever the factor is."""
    product = _times(factor, component)
    if product is None or component is None or not isinstance(factor, Tensor):
        return product
    return torch.where(component == 0, 0.0, product)


def _is_smooth_power(exponent: Any) -> bool:
    """Whether no derivative of x**exponent is infinite where the value is finite."""
    return isinstance(exponent, (int, float)) and (exponent >= 2 or exponent in (0, 1) or exponent < 0)


def gated(gate: Callable[..., Tensor]) -> Rule:
    """The rule of an operator whose derivative is one where ``gate(y, *args)`` holds and zero elsewhere.

    Components are selected, not multiplied, so that nothing infinite or undefined leaks from the side not taken.
    """

    def rule(op: Callable[..., Tensor], components: Components, x: HyperDual, *args: Any, **kwargs: Any) -> HyperDual:
        plain, options = primals((x, *args), kwargs)
        y = op(*plain, **options)
        open_ = gate(y, *bind(op, plain, options))
        return HyperDual(
            y, *(None if p is None else aten.where.ScalarOther(open_, p, 0.0) for p in (x.tangent, x.cross))
        )

    rule.kind = "gated"  # type: ignore[attr-defined]
    return rule


def _cases(*cases: str) -> str:
    """value if condition, .., otherwise the last value."""
    *conditional, last = cases
    return f"Piecewise({', '.join(f'({c})' for c in (*conditional, f'{last}, True'))})"


def _sinc(argument: str, terms: int) -> str:
    """sin(z)/z as a power series."""
    return " + ".join(f"(-1)**{k}*({argument})**{2 * k}/factorial({2 * k + 1})" for k in range(terms))


def _bessel(sign: int) -> str:
    """I_2(x)/x, or J_2(x)/x where the sign is -1, as a power series."""
    return " + ".join(f"({sign})**{k}*x**{2 * k + 1}/(4**{k + 1}*factorial({k})*factorial({k + 2}))" for k in range(9))


#: Power series where closed forms cancel or divide by zero.
_SINC, _SPHERICAL, _I2, _J2 = _sinc("pi*x", 9), _sinc("x", 10), _bessel(1), _bessel(-1)
#: The value of a function with a pole at zero, in a sum that another term decides there: infinite, not undefined.
_OFF_POLE = _cases("0, Eq(x, 0)", "y")

_DIVISION = (aten.div.Tensor, aten.div.Scalar)
ROWS: dict[Any, str | Formula] = {
    # powers, exponentials, logarithms
    aten.square.default: "x**2",
    aten.sqrt.default: Formula("sqrt(x)", steep=True),
    aten.rsqrt.default: "1/sqrt(x)",
    aten.reciprocal.default: "1/x",
    aten.exp.default: "exp(x)",
    aten.exp2.default: "2**x",
    aten.expm1.default: "exp(x) - 1",
    aten.log.default: "log(x)",
    aten.log2.default: "log(x)/log(2)",
    aten.log10.default: "log(x)/log(10)",
    aten.log1p.default: "log1p(x)",
    aten.logit.default: Formula("log(x/(1 - x))", ("1/(x*(1 - x))",), ("(2*x - 1)*dx**2",)),
    # trigonometric and hyperbolic functions; (1 - x)(1 + x) does not cancel near one as 1 - x^2 does
    aten.sin.default: "sin(x)",
    aten.cos.default: "cos(x)",
    aten.tan.default: "tan(x)",
    aten.asin.default: Formula("asin(x)", ("1/sqrt((1 - x)*(1 + x))",), ("x*dx**3",), steep=True),
    aten.acos.default: Formula("acos(x)", ("-1/sqrt((1 - x)*(1 + x))",), ("x*dx**3",), steep=True),
    aten.atan.default: "atan(x)",
    aten.sinh.default: "sinh(x)",
    aten.cosh.default: "cosh(x)",
    aten.tanh.default: "tanh(x)",
    aten.asinh.default: "asinh(x)",
    aten.acosh.default: Formula("acosh(x)", ("1/(sqrt(x - 1)*sqrt(x + 1))",), ("-x*dx**3",), steep=True),
    aten.atanh.default: Formula("atanh(x)", ("1/((1 - x)*(1 + x))",), ("2*x*dx**2",)),
    aten.sinc.default: Formula(
        "sin(pi*x)/(pi*x)",
        (_cases(f"horner(diff({_SINC}, x)), Abs(x) < 1/8", "(cos(pi*x) - y)/x"),),
        (_cases(f"horner(diff({_SINC}, x, 2)), Abs(x) < 1/8", "-pi**2*y - 2*dx/x"),),
    ),
    # activations
    aten.sigmoid.default: "sigmoid(x)",
    aten.log_sigmoid.default: Formula("log(sigmoid(x))", ("sigmoid(-x)",), ("dx*(dx - 1)",)),
    aten.silu.default: "x*sigmoid(x)",
    aten.mish.default: "x*tanh(softplus(x))",
    aten.softplus.default: Formula("log(1 + exp(x*w))/w", (_cases("1, x*w > v", "sigmoid(x*w)"), None, None)),
    aten.elu.default: Formula(
        "", (_cases("v, x > 0", "u*v*w*exp(u*x)"), None, None, None), (_cases("0, x >= 0", "u**2*v*w*exp(u*x)"),)
    ),
    aten.celu.default: Formula("", (_cases("1, x > 0", "exp(x/w)"), None), (_cases("0, x >= 0", "exp(x/w)/w"),)),
    aten.leaky_relu.default: Formula("", (_cases("1, x > 0", "w"), None)),
    aten._prelu_kernel.default: Formula(
        "", (_cases("1, x > 0", "w"), _cases("0, x > 0", "x")), ("0", _cases("0, x >= 0", "1"), "0")
    ),
    aten.hardswish.default: Formula("", (_cases("0, x <= -3", "1, x >= 3", "x/3 + 1/2"),)),
    aten.hardsigmoid.default: Formula("", (_cases("1/6, (x > -3) & (x < 3)", "0"),)),
    # special functions
    aten.erf.default: "erf(x)",
    aten.erfc.default: "erfc(x)",
    aten.erfinv.default: "erfinv(x)",
    aten.special_erfcx.default: "erfcx(x)",
    aten.special_ndtr.default: Formula("erfc(-x/sqrt(2))/2", ("exp(-x**2/2)/sqrt(2*pi)",)),
    aten.special_log_ndtr.default: Formula("", ("sqrt(2/pi)/erfcx(-x/sqrt(2))",), ("-dx*(x + dx)",)),
    aten.special_ndtri.default: "ndtri(x)",
    aten.special_entr.default: Formula("-x*log(x)", ("-log(x) - 1",), steep=True),
    aten.lgamma.default: "lgamma(x)",
    aten.digamma.default: "polygamma(0, x)",
    aten.polygamma.default: Formula("polygamma(x, w)", (None, "polygamma(x + 1, w)")),
    (aten.i0.default, aten.special_modified_bessel_i0.default): Formula(
        "i0(x)", None, (_cases("1/2, Eq(x, 0)", "y - dx/x"),)
    ),
    aten.special_i0e.default: "i0e(x)",
    (aten.special_i1.default, aten.special_modified_bessel_i1.default): Formula(
        "",
        (_cases("1/2, Eq(x, 0)", "i0(x) - y/x"),),
        ("y - " + _cases(f"horner({_I2}), Abs(x) < 1", "(dx - y/x)/x"),),
    ),
    aten.special_i1e.default: Formula(
        "",
        (_cases("1/2, Eq(x, 0)", "i0e(x) - y*(sign(x) + 1/x)"),),
        ("-2*sign(x)*dx - " + _cases(f"exp(-Abs(x))*horner({_I2}), Abs(x) < 1", "(dx + sign(x)*y - y/x)/x"),),
    ),
    aten.special_bessel_j0.default: Formula("bessel_j0(x)", None, (_cases("-1/2, Eq(x, 0)", "-y - dx/x"),)),
    aten.special_bessel_j1.default: Formula(
        "bessel_j1(x)", None, (_cases(f"horner({_J2}), Abs(x) < 1", "(y/x - dx)/x") + " - y",)
    ),
    aten.special_bessel_y0.default: Formula("", ("-bessel_y1(x)",), (f"-dx/x - {_OFF_POLE}",)),
    aten.special_bessel_y1.default: Formula(
        "", (_cases("0, Eq(x, 0)", "bessel_y0(x)") + " - y/x",), (f"(y/x - dx)/x - {_OFF_POLE}",)
    ),
    aten.special_modified_bessel_k0.default: Formula("", ("-k1(x)",), ("y - dx/x",)),
    aten.special_modified_bessel_k1.default: Formula("", ("-k0(x) - y/x",), ("(y/x - dx)/x + y",)),
    # large terms cancel where x is large: integrals have the differences
    aten.special_scaled_modified_bessel_k0.default: Formula(
        "",
        (_cases(f"{_OFF_POLE} - k1e(x), x < 3/2", "-k_moment(1, x)"),),
        (_cases("2*y + (1/x - 2)*k1e(x), x < 3/2", "k_moment(2, x)"),),
    ),
    aten.special_scaled_modified_bessel_k1.default: Formula(
        "",
        (_cases("(1 - 1/x)*y - k0e(x), x < 3/2", "-k_moment(1, x) - k_moment(2, x)"),),
        (_cases("(2 - 1/x)*dx + (1 + 1/x)*y/x, x < 3/2", "k_moment(2, x) + k_moment(3, x)"),),
    ),
    aten.special_spherical_bessel_j0.default: Formula(
        "",
        (_cases(f"horner(diff({_SPHERICAL}, x)), Abs(x) < 1", "(cos(x) - y)/x"),),
        (_cases(f"horner(diff({_SPHERICAL}, x, 2)), Abs(x) < 1", "-y - 2*dx/x"),),
    ),
    # polynomials, whose degree is whole: its fraction is cut off
    (
        aten.special_hermite_polynomial_h.default, aten.special_hermite_polynomial_h.x_scalar,
        aten.special_hermite_polynomial_h.n_scalar,
    ): Formula(
        "", ("2*floor(w)*hermite_h(x, w - 1)", "0"), ("4*floor(w)*(floor(w) - 1)*hermite_h(x, w - 2)", "0", "0")
    ),
    (
        aten.special_hermite_polynomial_he.default, aten.special_hermite_polynomial_he.x_scalar,
        aten.special_hermite_polynomial_he.n_scalar,
    ): Formula(
        "", ("floor(w)*hermite_he(x, w - 1)", "0"), ("floor(w)*(floor(w) - 1)*hermite_he(x, w - 2)", "0", "0")
    ),
    aten.igamma.default: Formula("", (None, "exp((x - 1)*log(w) - w - lgamma(x))")),
    aten.igammac.default: Formula("", (None, "-exp((x - 1)*log(w) - w - lgamma(x))")),
    (aten.special_zeta.default, aten.special_zeta.self_scalar): Formula(
        "zeta(x, w)", (None, "-x*zeta(x + 1, w)")
    ),
    # signs, rounding and units
    aten.neg.default: "-x",
    aten.abs.default: "Abs(x)",
    aten.positive.default: "x",
    aten.frac.default: Formula("", ("1",)),
    aten.deg2rad.default: "x*pi/180",
    aten.rad2deg.default: "x*180/pi",
    (aten.copysign.Tensor, aten.copysign.Scalar): Formula("", ("sign(x)*sign(y)", "0")),
    aten.heaviside.default: Formula("", ("0", _cases("1, Eq(x, 0)", "0"))),
    (aten.fmod.Tensor, aten.fmod.Scalar): Formula("", ("1", "-truncated_quotient(x, w)")),
    (aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor): Formula(
        "", ("1", "-floored_quotient(x, w)")
    ),
    # two and more arguments
    (aten.add.Tensor, aten.add.Scalar): "x + w*v",
    (aten.sub.Tensor, aten.sub.Scalar): "x - w*v",
    (aten.rsub.Tensor, aten.rsub.Scalar): "w - x*v",
    (aten.mul.Tensor, aten.mul.Scalar): "x*w",
    _DIVISION: Formula("x/w", ("1/w", "-y/w"), ("0", "-dx**2", "-2*dw/w")),
    (
        aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar,
        aten.float_power.Tensor_Scalar, aten.float_power.Tensor_Tensor, aten.float_power.Scalar,
    ): Formula("power(x, w)", steep=True),
    aten.ldexp.Tensor: "x*2**w",
    aten.hypot.default: Formula("sqrt(x**2 + w**2)", ("x/y", "w/y"), ("dw**2/y", "-dx*dw/y", "dx**2/y"), steep=True),
    aten.atan2.default: Formula(
        "atan2(x, w)", ("w*inverse(x**2 + w**2)", "-x*inverse(x**2 + w**2)"), ("2*dx*dw", "dw**2 - dx**2", "-2*dx*dw")
    ),
    aten.logaddexp.default: Formula(
        "log(exp(x) + exp(w))", ("sigmoid(x - w)", "sigmoid(w - x)"), ("dx*dw", "-dx*dw", "dx*dw")
    ),
    aten.logaddexp2.default: Formula(
        "log(2**x + 2**w)/log(2)",
        ("sigmoid(log(2)*(x - w))", "sigmoid(log(2)*(w - x))"),
        ("log(2)*dx*dw", "-log(2)*dx*dw", "log(2)*dx*dw"),
    ),
    (aten.xlogy.Tensor, aten.xlogy.Scalar_Other, aten.xlogy.Scalar_Self): Formula(
        "x*log(w)", (_cases("0, Eq(x, 0) & (w <= 0)", "log(w)"), "x/w"), steep=True
    ),
    (aten.special_xlog1py.default, aten.special_xlog1py.other_scalar, aten.special_xlog1py.self_scalar): Formula(
        "x*log1p(w)", (_cases("0, Eq(x, 0) & (w <= -1)", "log1p(w)"), "x/(1 + w)"), steep=True
    ),
}  # fmt: skip

GATED: dict[Any, Callable[..., Tensor]] = {
    aten.relu.default: lambda y, x: y > 0,
    aten.relu6.default: lambda y, x: (y > 0) & (y < 6),
    aten.threshold.default: lambda y, x, threshold, value: x > threshold,
    aten.hardtanh.default: lambda y, x, low, high: (x > low) & (x < high),
    aten.hardshrink.default: lambda y, x, bound: x.abs() > bound,
    aten.softshrink.default: lambda y, x, bound: x.abs() > bound,
    aten.nan_to_num.default: lambda y, x, nan, positive, negative: x.isfinite(),
}


def formula_of(op: Any) -> Formula:
    """The operator's row of the table."""
    row = ROWS[op]
    return Formula(row) if isinstance(row, str) else row


def _by_number(division: Rule) -> Rule:
    """A division by a number that is zero, or known only when the graph runs, divides the components too.

    The formula would take the number's reciprocal, and Python has none of zero.
    """

    def rule(op: Any, components: Components, x: Any, w: Any) -> HyperDual:
        if isinstance(w, (torch.SymInt, torch.SymFloat)) or (isinstance(w, (int, float, complex)) and not w):
            return HyperDual(op(x.primal, w), *(None if c is None else op(c, w) for c in (x.tangent, x.cross)))
        return division(op, components, x, w)

    rule.kind = "elementwise"  # type: ignore[attr-defined]
    return rule


for ops in ROWS:
    register(ops, _by_number(served(formula_of(ops))) if ops == _DIVISION else served(formula_of(ops)))
for ops, gate in GATED.items():
    register(ops, gated(gate))
