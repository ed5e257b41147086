"""Elementwise operators: one sympy expression each, from which f' and f'' are derived.

For y = f(a, b, ..): y_i = sum_a f_a a_i and y_c = sum_a f_a a_c + sum_ab f_ab [S_c applied to a_i b_j]. Derivatives
are written in terms of the output ``y`` where that takes fewer operations (tanh: f' = 1 - y^2, f'' = -2 y f'),
subexpressions are shared, and sympy's own torch printer makes the code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import sympy
import torch
from sympy.functions.elementary.piecewise import Piecewise
from sympy.printing.pytorch import TorchPrinter
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.rules.registry import register
from fomoh_fx.rules.stacking import align, bind, primals

aten = torch.ops.aten
Y = sympy.Symbol("y", real=True)
D = sympy.Symbol("d", real=True)  # the first derivative, shared by the second
ARGUMENTS = ("x", "w", "v")


class sigmoid(sympy.Function):
    """1 / (1 + exp(-x)) without overflow."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return self * (1 - self)


class ndtri(sympy.Function):
    """The inverse of the standard normal distribution function."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.sqrt(2 * sympy.pi) * sympy.exp(self**2 / 2)


class polygamma(sympy.Function):
    """The n-th derivative of digamma, n a whole number."""

    def fdiff(self, argindex: int = 2) -> sympy.Expr:
        return polygamma(self.args[0] + 1, self.args[1])


class _Printer(TorchPrinter):
    """sympy's torch printer, with piecewise values in the dtype of the output and functions that sympy lacks."""

    def __init__(self) -> None:
        super().__init__({"fully_qualified_modules": False, "inline": True, "allow_unknown_functions": True})

    def _print_Piecewise(self, expr: Piecewise) -> str:
        *rest, (last, _) = expr.args
        code = self._print(last)
        for value, condition in reversed(rest):
            code = f"select(y, {self._print(condition)}, {self._print(value)}, {code})"
        return code

    def _print_Function(self, expr: sympy.Function) -> str:
        try:
            return super()._print_Function(expr)
        except NotImplementedError:
            return f"{type(expr).__name__}({', '.join(map(self._print, expr.args))})"


def _select(y: Tensor, condition: Tensor, true: Any, false: Any) -> Tensor:
    """where() that does not take the default dtype for two Python numbers."""
    if not isinstance(true, Tensor) and not isinstance(false, Tensor):
        true = torch.scalar_tensor(true, dtype=y.dtype, device=y.device)
    return torch.where(condition, true, false)


FUNCTIONS = {"sigmoid": sigmoid, "ndtri": ndtri, "polygamma": polygamma}
_TORCH = {
    "select": _select,
    "ndtri": torch.special.ndtri,
    "polygamma": lambda n, x: torch.special.polygamma(int(n), x),
    "loggamma": torch.lgamma,
    "lgamma": torch.lgamma,
}


def _numeric(expression: sympy.Expr) -> sympy.Expr:
    """Irrational constants as floating-point numbers: torch functions take no Python numbers."""
    return expression.replace(lambda e: e.is_number and e.is_irrational, lambda e: sympy.Float(float(e), 17))


@cache
def _first(expression: str, given: str | None, names: tuple[str, ...], at: int) -> sympy.Expr:
    """f_a for the argument number ``at``, in terms of the arguments and, where it is cheaper, of the output y."""
    symbols = [sympy.Symbol(name, real=True) for name in names]
    space = {**FUNCTIONS, **dict(zip(names, symbols, strict=True)), "y": Y}
    if given is not None:
        return sympy.sympify(given, locals=space)
    f = sympy.sympify(expression, locals=space)
    x = symbols[at]
    derivative = sympy.diff(f, x).replace(sympy.DiracDelta, lambda *_: sympy.Integer(0))
    candidates = [derivative, derivative.subs(f, Y), sympy.simplify(derivative.subs(f, Y))]
    if len(names) == 1 and not f.has(sympy.Abs, Piecewise):
        try:
            inverses = sympy.solve(f - Y, x)
        except NotImplementedError:
            inverses = []
        if len(inverses) == 1:
            candidates.append(sympy.simplify(derivative.subs(x, inverses[0])))
    usable = [c for c in candidates if not c.has(sympy.Derivative, sympy.I)]
    return min(usable, key=lambda c: (_cost(c), str(c)))


def _cost(expression: sympy.Expr) -> int:
    """Arithmetic is cheap, a transcendental function of a whole tensor is not, and a power is a square root or worse."""
    functions = expression.atoms(sympy.Function)
    roots = [p for p in expression.atoms(sympy.Pow) if not p.exp.is_Integer]
    return sympy.count_ops(expression) + 10 * len(functions) + 4 * len(roots)


@cache
def _compiled(
    expression: str, given: tuple[str | None, ...] | None, names: tuple[str, ...], constants: tuple[Any, ...],
    active: tuple[int, ...], second: bool,
) -> tuple[Callable[..., list[Any]], list[tuple[int, ...]]]:  # fmt: skip
    """One function of (arguments, y) that returns the non-zero partial derivatives, and what each of them is.

    Constants are known numbers (a power's exponent), substituted before differentiation.
    """
    symbols = [sympy.Symbol(name, real=True) for name in names]
    known = {s: sympy.nsimplify(c) for s, c in zip(symbols, constants, strict=True) if c is not None}
    if known and given is None:
        space = {**FUNCTIONS, **dict(zip(names, symbols, strict=True))}
        expression = str(sympy.sympify(expression, locals=space).subs(known))
    wanted: list[tuple[int, ...]] = []
    values: list[sympy.Expr] = []
    for n, a in enumerate(active):
        first = _first(expression, given[a] if given else None, names, a).subs(known)
        wanted.append((a,))
        values.append(first)
        for b in active[n:] if second else ():
            value = sympy.diff(first, symbols[b])
            if first.has(Y):
                through = D if b == a else _first(expression, given[b] if given else None, names, b).subs(known)
                value = value + sympy.diff(first, Y) * through
            value = value.replace(sympy.DiracDelta, lambda *_: sympy.Integer(0))
            value = value.subs(D, first) if first.is_number else value
            wanted.append((a, b))
            values.append(sympy.factor_terms(value) if value.has(D) else _cheaper(value))
    keep = [i for i, v in enumerate(values) if v != 0]
    wanted, values = [wanted[i] for i in keep], [values[i] for i in keep]
    firsts = {w: v for w, v in zip(wanted, values, strict=True) if len(w) == 1}
    values = [v.subs(D, firsts[w[:1]]) if v.has(D) else v for w, v in zip(wanted, values, strict=True)]
    values = [_numeric(v) for v in values]
    code = sympy.lambdify([*symbols, Y], values, modules=[_TORCH, "torch"], printer=_Printer(), cse=True)
    return code, wanted


def _cheaper(value: sympy.Expr) -> sympy.Expr:
    return min((value, sympy.simplify(value)), key=lambda c: (_cost(c), str(c)))


def elementwise(expression: str, *, first: str | tuple[str | None, ...] | None = None) -> Callable[..., HyperDual]:
    """The rule of an operator that computes ``expression`` in each element.

    Args:
        expression: in sympy's syntax; the arguments are its symbols in alphabetical order x, w.. as listed by
            :data:`ARGUMENTS` (``x`` the first, ``w`` the second, ``v`` the third).
        first: f' given by hand, in terms of the arguments and the output ``y``, where the derived form would
            overflow or cancel; one for each argument. The second derivative is derived from it.
    """
    space = {**FUNCTIONS, **{name: sympy.Symbol(name, real=True) for name in ARGUMENTS}}
    free = {str(s) for s in sympy.sympify(expression, locals=space).free_symbols}
    names = tuple(name for name in ARGUMENTS if name in free) or ("x",)
    given = (first,) if isinstance(first, str) else first

    def rule(op: Callable[..., Tensor], components: Components, *args: Any, **kwargs: Any) -> HyperDual:
        plain, options = primals(args, kwargs)
        y = op(*plain, **options)
        operands = bind(op, args, kwargs)[: len(names)]
        values = [a.primal if isinstance(a, HyperDual) else a for a in operands]
        active = tuple(n for n, a in enumerate(operands) if isinstance(a, HyperDual))
        constants = tuple(_exact(v) for v in values)
        second = components.second_order is not None and any(operands[n].tangent is not None for n in active)
        derivatives, wanted = _compiled(expression, given, names, constants, active, second)
        partial = dict(zip(wanted, derivatives(*values, y), strict=True))

        def of(n: int, part: str) -> Tensor | None:
            stacked = getattr(operands[n], part)
            return None if stacked is None else align(stacked, operands[n].primal, y.ndim)

        tangents = {n: of(n, "tangent") for n in active}
        tangent = add(*(_times(partial.get((n,)), tangents[n]) for n in active))
        cross = None
        if components.second_order is not None:
            cross = add(*(_times(partial.get((n,)), of(n, "cross")) for n in active))
            for n, m in (w for w in wanted if len(w) == 2):
                x, w = tangents[n], tangents[m]
                if x is not None and w is not None:
                    pair = components.square(x) if n == m else components.product(torch.mul, x, w)
                    cross = add(cross, _times(partial[n, m], pair))
        return HyperDual(y, tangent, cross)

    rule.kind = "elementwise"  # type: ignore[attr-defined]
    rule.expression, rule.names, rule.first = expression, names, given  # type: ignore[attr-defined]
    return rule


def _exact(value: Any) -> Any:
    """Numbers worth substituting: whole and half numbers (exponents), which simplify the derivatives."""
    return value if type(value) in (int, float) and abs(value) < 1e6 and value * 2 == int(value * 2) else None


def _times(factor: Any, component: Tensor | None) -> Tensor | None:
    """factor * component, where the symbolic zero absorbs and one is not multiplied by."""
    if factor is None or component is None:
        return None
    if not isinstance(factor, Tensor):
        return component if factor == 1 else -component if factor == -1 else component * factor
    return factor * component


def gated(gate: Callable[..., Tensor]) -> Callable[..., HyperDual]:
    """The rule of an operator whose derivative is one where ``gate(y, *args)`` holds and zero elsewhere.

    Components are selected, not multiplied, so that nothing infinite or undefined leaks from the side not taken.
    """

    def rule(op: Callable[..., Tensor], components: Components, x: Any, *args: Any, **kwargs: Any) -> HyperDual:
        plain, options = primals((x, *args), kwargs)
        y = op(*plain, **options)
        open_ = gate(y, *bind(op, plain, options))
        return HyperDual(y, *(None if p is None else aten.where.ScalarOther(open_, p, 0.0) for p in (x.tangent, x.cross)))

    rule.kind = "gated"  # type: ignore[attr-defined]
    return rule


UNARY: dict[Any, str | tuple[str, str]] = {
    aten.exp: "exp(x)",
    aten.exp2: "2**x",
    aten.expm1: ("exp(x) - 1", "y + 1"),
    aten.log: "log(x)",
    aten.log2: "log(x)/log(2)",
    aten.log10: "log(x)/log(10)",
    aten.log1p: "log(1 + x)",
    aten.sqrt: "sqrt(x)",
    aten.rsqrt: "1/sqrt(x)",
    aten.reciprocal: "1/x",
    aten.square: "x**2",
    aten.neg: "-x",
    aten.positive: "x",
    aten.sin: "sin(x)",
    aten.cos: "cos(x)",
    aten.tan: "tan(x)",
    aten.asin: "asin(x)",
    aten.acos: "acos(x)",
    aten.atan: "atan(x)",
    aten.sinh: "sinh(x)",
    aten.cosh: "cosh(x)",
    aten.tanh: "tanh(x)",
    aten.asinh: "asinh(x)",
    aten.acosh: "acosh(x)",
    aten.atanh: "atanh(x)",
    aten.sigmoid: ("sigmoid(x)", "y*(1 - y)"),
    aten.silu: "x*sigmoid(x)",
    aten.mish: "x*tanh(log(1 + exp(x)))",
    aten.erf: "erf(x)",
    aten.erfc: "erfc(x)",
    aten.erfinv: ("erfinv(x)", "sqrt(pi)/2*exp(y**2)"),
    aten.lgamma: ("loggamma(x)", "polygamma(0, x)"),
    aten.digamma: "polygamma(0, x)",
    aten.special_ndtri: "ndtri(x)",
    aten.logit: "log(x/(1 - x))",
    aten.deg2rad: "x*pi/180",
    aten.rad2deg: "x*180/pi",
    aten.softplus: ("log(1 + exp(x*w))/w", "Piecewise((1, x*w > v), (sigmoid(x*w), True))"),
    aten.leaky_relu: ("Piecewise((x, x > 0), (x*w, True))", "Piecewise((1, x > 0), (w, True))"),
    aten.hardswish: (
        "Piecewise((0, x < -3), (x, x > 3), (x*(x + 3)/6, True))",
        "Piecewise((0, x < -3), (1, x > 3), (x/3 + 1/2, True))",
    ),
    aten.hardsigmoid: (
        "Piecewise((0, x < -3), (1, x > 3), (x/6 + 1/2, True))",
        "Piecewise((1/6, (x > -3) & (x < 3)), (0, True))",
    ),
}

BINARY: dict[Any, str | tuple[str, tuple[str | None, ...]]] = {
    (aten.add.Tensor, aten.add.Scalar): "x + w*v",
    (aten.sub.Tensor, aten.sub.Scalar): "x - w*v",
    (aten.rsub.Tensor, aten.rsub.Scalar): "w - x*v",
    (aten.mul.Tensor, aten.mul.Scalar): "x*w",
    (aten.div.Tensor, aten.div.Scalar): "x/w",
    (aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar): "x**w",
    aten.atan2.default: ("atan2(x, w)", ("w/(x**2 + w**2)", "-x/(x**2 + w**2)")),
    aten.hypot.default: ("sqrt(x**2 + w**2)", ("x/y", "w/y")),
}

GATED: dict[Any, Callable[..., Tensor]] = {
    aten.relu: lambda y, x: y > 0,
    aten.relu6: lambda y, x: (y > 0) & (y < 6),
    aten.threshold: lambda y, x, threshold, value: x > threshold,
    aten.hardtanh: lambda y, x, low, high: (x > low) & (x < high),
    aten.hardshrink: lambda y, x, bound: x.abs() > bound,
    aten.softshrink: lambda y, x, bound: x.abs() > bound,
}

_GELU = {
    "none": elementwise("x*(1 + erf(x/sqrt(2)))/2"),
    "tanh": elementwise("x*(1 + tanh(sqrt(2/pi)*(x + 0.044715*x**3)))/2"),
}


def _gelu(op: Any, components: Components, x: HyperDual, *, approximate: str = "none") -> HyperDual:
    return _GELU[approximate](op, components, x, approximate=approximate)


_gelu.kind = "elementwise"  # type: ignore[attr-defined]

for table in (UNARY, BINARY):
    for ops, row in table.items():
        register(ops, elementwise(row) if isinstance(row, str) else elementwise(row[0], first=row[1]))
for ops, gate in GATED.items():
    register(ops, gated(gate))
register(aten.gelu.default, _gelu)
