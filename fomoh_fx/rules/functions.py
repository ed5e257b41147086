"""Functions for elementwise rows that sympy lacks, or that PyTorch computes with conventions of its own.

Each has its partial derivatives in its arguments x, w, .. and its own value y, and the torch function that evaluates
it. A derivative of None does not exist in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy
import torch
from torch import Tensor

ARGUMENTS = ("x", "w", "v", "u")
SYMBOLS = tuple(sympy.Symbol(name, real=True) for name in ARGUMENTS)
Y = sympy.Symbol("y", real=True)
#: The first derivatives, which second derivatives share: dx is f_x.
FIRSTS = tuple(sympy.Symbol(f"d{name}", real=True) for name in ARGUMENTS)


@dataclass(frozen=True)
class Named:
    """A function's partial derivatives, and its implementation."""

    derivatives: tuple[str | None, ...]
    implementation: Callable[..., Any]


def _log(x: Any) -> Any:
    """log, of a Python number as well."""
    if isinstance(x, Tensor):
        return torch.log(x)
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def _log1p(x: Any) -> Any:
    return torch.log1p(x) if isinstance(x, Tensor) else math.log1p(x) if x > -1 else _log(1 + x)


def _monomial(factor: Any, x: Any, exponent: Any) -> Any:
    """factor * x**exponent, and zero where the factor is zero."""
    if isinstance(factor, Tensor):
        return torch.where(factor == 0, 0.0, factor * torch.pow(x, exponent))
    return 0.0 if factor == 0 else factor * torch.pow(x, exponent)


def _masked_log(x: Any, exponent: Any) -> Any:
    """log(x), and zero where x is zero and the exponent is not negative."""
    if not isinstance(x, Tensor) and x != 0:
        return _log(x)
    kept = (x == 0) & (exponent.real >= 0)
    return torch.where(kept, 0.0, _log(x) if isinstance(x, Tensor) else torch.full_like(exponent.real, -math.inf))


def _sigmoid(x: Tensor) -> Tensor:
    """1/(1 + exp(-x)); PyTorch's own of a complex number with a large negative real part is not a number."""
    if not x.is_complex():
        return torch.sigmoid(x)
    right = x.real >= 0
    small = torch.where(right, -x, x).exp()
    return torch.where(right, 1.0, small) / (1 + small)


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1 / x)


def _floor(x: Any) -> Any:
    """floor, of a Python number as well."""
    return torch.floor(x) if isinstance(x, Tensor) else x // 1


def _polygamma(order: Any, x: Tensor) -> Tensor:
    return torch.special.polygamma(int(order), x)


def _k_moment(order: Any, x: Tensor) -> Tensor:
    """The integral of (cosh t - 1)^order exp(-x (cosh t - 1)) over t > 0, of Bessel's K, for x >= 3/2 and order >= 1.

    The trapezoidal rule in s = sqrt(2 x) sinh(t/2), where the integrand is exp(-s^2) times a smooth function: no term
    cancels another, and 26 of them give double precision.
    """
    squares = (0.25 * torch.arange(1, 27, dtype=x.dtype, device=x.device)).square()
    terms = 0.5 * torch.exp(-squares) * squares**order * torch.rsqrt(2 * x.unsqueeze(-1) + squares)
    return terms.sum(-1) / x**order


def _quotient(rounding: str) -> Callable[[Any, Any], Any]:
    return lambda x, w: torch.div(x, w, rounding_mode=rounding)


NAMED: dict[str, Named] = {
    "sigmoid": Named(("y*(1 - y)",), _sigmoid),
    "softplus": Named(("sigmoid(x)",), torch.nn.functional.softplus),
    "log1p": Named(("1/(1 + x)",), _log1p),
    "erfcx": Named(("2*x*y - 2/sqrt(pi)",), torch.special.erfcx),
    "ndtri": Named(("sqrt(2*pi)*exp(y**2/2)",), torch.special.ndtri),
    "lgamma": Named(("polygamma(0, x)",), torch.lgamma),
    "polygamma": Named((None, "polygamma(x + 1, w)"), _polygamma),
    "zeta": Named((None, "-x*zeta(x + 1, w)"), torch.special.zeta),
    "i0": Named(("i1(x)",), torch.special.i0),
    "i1": Named(("Piecewise((1/2, Eq(x, 0)), (i0(x) - y/x, True))",), torch.special.i1),
    "i0e": Named(("i1e(x) - sign(x)*y",), torch.special.i0e),
    "i1e": Named(("Piecewise((1/2, Eq(x, 0)), (i0e(x) - y*(sign(x) + 1/x), True))",), torch.special.i1e),
    "bessel_j0": Named(("-bessel_j1(x)",), torch.special.bessel_j0),
    "bessel_j1": Named(("Piecewise((1/2, Eq(x, 0)), (bessel_j0(x) - y/x, True))",), torch.special.bessel_j1),
    "bessel_y0": Named(("-bessel_y1(x)",), torch.special.bessel_y0),
    "bessel_y1": Named(("bessel_y0(x) - y/x",), torch.special.bessel_y1),
    "k0": Named(("-k1(x)",), torch.special.modified_bessel_k0),
    "k1": Named(("-k0(x) - y/x",), torch.special.modified_bessel_k1),
    "k0e": Named(
        ("Piecewise((y - k1e(x), x < 3/2), (-k_moment(1, x), True))",), torch.special.scaled_modified_bessel_k0
    ),
    "k1e": Named(
        ("Piecewise(((1 - 1/x)*y - k0e(x), x < 3/2), (-k_moment(1, x) - k_moment(2, x), True))",),
        torch.special.scaled_modified_bessel_k1,
    ),
    "k_moment": Named(("0", "-k_moment(x + 1, w)"), _k_moment),
    "floor": Named(("0",), _floor),
    "hermite_h": Named(("2*floor(w)*hermite_h(x, w - 1)", "0"), torch.special.hermite_polynomial_h),
    "hermite_he": Named(("floor(w)*hermite_he(x, w - 1)", "0"), torch.special.hermite_polynomial_he),
    "truncated_quotient": Named(("0", "0"), _quotient("trunc")),
    "floored_quotient": Named(("0", "0"), _quotient("floor")),
    # 1/x, and zero at zero, where the angle of a point has no derivative
    "inverse": Named(("-y**2",), _inverse),
    # x**w as autograd has it: no derivative in x where w is zero, none in w where x is zero and w is not negative
    "power": Named(("monomial(w, x, w - 1)", "y*masked_log(x, w)"), torch.pow),
    "monomial": Named(("power(w, v)", "monomial(x*v, w, v - 1)", "x*power(w, v)*masked_log(w, v)"), _monomial),
    "masked_log": Named(("1/x", "0"), _masked_log),
}

#: What generated code calls by name; every other function is torch's own of that name.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "log": _log,
    **{name: named.implementation for name, named in NAMED.items()},
}


def _numbers_are_powers(cls: type, *args: sympy.Expr) -> sympy.Expr | None:
    """Powers whose exponent is a number, or whose base is a positive one, need no conventions."""
    factor, x, exponent = args if len(args) == 3 else (sympy.Integer(1), *args)
    if factor.is_Number and (exponent.is_Number or (x.is_Number and x.is_positive)):
        return factor * x**exponent
    return None


def _symbolic(name: str, derivatives: tuple[str | None, ...]) -> type[sympy.Function]:
    """The function as sympy sees it."""

    def fdiff(self: sympy.Function, argindex: int = 1) -> sympy.Expr:
        derivative = derivatives[argindex - 1]
        if derivative is None:
            raise sympy.function.ArgumentIndexError(self, argindex)
        return parse(derivative).subs({**dict(zip(SYMBOLS, self.args, strict=False)), Y: self}, simultaneous=True)

    methods: dict[str, Any] = {"fdiff": fdiff}
    if name in ("power", "monomial"):
        methods["eval"] = classmethod(_numbers_are_powers)
    if name == "floor":
        methods["eval"] = classmethod(lambda cls, x: sympy.floor(x) if x.is_number else None)
    return type(name, (sympy.Function,), methods)


FUNCTIONS = {name: _symbolic(name, named.derivatives) for name, named in NAMED.items()}


@cache
def parse(text: str) -> sympy.Expr:
    """An expression in sympy's syntax, with the functions of this table."""
    names = {str(symbol): symbol for symbol in (*SYMBOLS, *FIRSTS, Y)}
    return sympy.sympify(text, locals={**FUNCTIONS, **names})
