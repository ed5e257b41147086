"""Deriving the first and second partial derivatives of an elementwise expression, as torch code.

Derivatives are written in terms of the output ``y`` where that takes fewer operations (tanh: f' = 1 - y^2), second
derivatives in terms of the first ones (f'' = -2 y f'), common subexpressions are shared, and sympy's own torch printer
makes the code. Everything is derived at the first use and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.functions.elementary.piecewise import Piecewise
from sympy.logic.boolalg import Boolean
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.pytorch import TorchPrinter
from torch import Tensor

from fomoh_fx.errors import ArgumentError
from fomoh_fx.rules.functions import ARGUMENTS, FIRSTS, IMPLEMENTATIONS, SYMBOLS, Y, parse

Pair = tuple[int, ...]


@dataclass(frozen=True)
class Formula:
    """What an operator computes in each element of its arguments x, w, v, u, in sympy's syntax.

    Attributes:
        expression: the value, or "" where ``first`` says all that is needed.
        first: the first derivatives, given where the derived ones would overflow or cancel, in terms of the arguments
            and of the output y; None for an argument in which no derivative exists.
        second: the second derivatives (0,0), (0,1), .. (1,1), .., given in terms of y and of the first ones dx, dw, ..
        steep: whether a derivative is infinite where the value is finite. A component of zero stays zero there, as in
            reverse mode behind a mask: ``x.relu().sqrt()`` has no NaN where x is negative. (At an isolated point such
            as ``(x**4).sqrt()`` at 0, where reverse mode has a NaN, that is zero, too.)
    """

    expression: str
    first: tuple[str | None, ...] | None = None
    second: tuple[str, ...] | None = None
    steep: bool = False

    @cached_property
    def arity(self) -> int:
        """How many of the operator's arguments the formula speaks of."""
        texts = [self.expression, *(t for t in self.first or () if t is not None)]
        used = set().union(*(parse(text).free_symbols for text in texts if text))
        return max([len(self.first or ()), 1, *(i + 1 for i, symbol in enumerate(SYMBOLS) if symbol in used)])

    def has_derivative(self, argument: int) -> bool:
        """Whether a derivative in the argument number ``argument`` is known."""
        return argument < self.arity and (self.first is None or self.first[argument] is not None)


def validate(formula: Formula) -> None:
    """Refuse what cannot be parsed, and unknown names.

    Raises:
        ArgumentError: says which text, and what in it.
    """
    texts = {"expression": (formula.expression,), "first": formula.first or (), "second": formula.second or ()}
    allowed = {"expression": {*SYMBOLS}, "first": {*SYMBOLS, Y}, "second": {*SYMBOLS, Y, *FIRSTS}}
    for name, text in [(name, t) for name, listed in texts.items() for t in listed if t is not None]:
        try:
            expression = parse(text)
            unknown = expression.free_symbols - allowed[name] | expression.atoms(AppliedUndef)
        except Exception as error:  # sympy evaluates the text, which may fail in any way
            raise ArgumentError(f"{name}: {text!r} is not an expression ({type(error).__name__}: {error})") from error
        if unknown:
            raise ArgumentError(f"{name}: {text!r} has {', '.join(sorted(map(str, unknown)))}, which is not known")


@dataclass(frozen=True)
class Partials:
    """The partial derivatives that are not zero: ``run(*arguments, y)`` returns one for each entry of ``wanted``.

    ``(a,)`` stands for f_a and ``(a, b)`` for f_ab. A derivative may be a Python number.
    """

    wanted: tuple[Pair, ...]
    source: str
    run: Callable[..., tuple[Any, ...]]


@cache
def derive(formula: Formula, known: tuple[Any, ...], active: tuple[int, ...], second: bool) -> Partials:
    """The derivatives in the active arguments.

    Args:
        known: for each argument a number to substitute before differentiation (an exponent), the name of an earlier
            argument that it is the same as, or None.
        active: the arguments with components.
        second: whether second derivatives are wanted.
    """
    settings = {SYMBOLS[n]: _exact(value) for n, value in enumerate(known) if value is not None}
    firsts = {a: _first(formula, a, settings) for a in range(formula.arity) if formula.has_derivative(a)}
    values: dict[Pair, sympy.Expr] = {}
    for n, a in enumerate(active):
        values[a,] = firsts[a]
        for b in active[n:] if second else ():
            values[a, b] = _second(formula, a, b, firsts, settings)
    values = {pair: value for pair, value in values.items() if value != 0}
    source = _source({FIRSTS[a]: first for a, first in firsts.items()}, values, formula.arity)
    namespace: dict[str, Any] = {"torch": torch, "select": _select, **IMPLEMENTATIONS}
    exec(compile(source, f"<derivatives of {formula.expression}>", "exec"), namespace)
    return Partials(tuple(values), source, namespace["derivatives"])


def _exact(value: float | str) -> sympy.Expr:
    """A whole or half number, or another argument."""
    return parse(value) if isinstance(value, str) else sympy.Rational(int(value * 2), 2)


def _first(formula: Formula, a: int, settings: dict[sympy.Symbol, sympy.Expr]) -> sympy.Expr:
    """f_a in terms of the arguments and, where it is cheaper, of the output y."""
    if formula.first is not None:
        return parse(formula.first[a]).subs(settings)
    if SYMBOLS[a] in settings:
        return sympy.Integer(0)
    f = parse(formula.expression).subs(settings)
    derivative = _without_jumps(sympy.diff(f, SYMBOLS[a]))
    constant, varying = f.as_coeff_Add()
    return _cheapest([derivative, derivative.subs(f, Y), derivative.subs(varying, Y - constant)])


def _second(
    formula: Formula, a: int, b: int, firsts: dict[int, sympy.Expr], settings: dict[sympy.Symbol, sympy.Expr]
) -> sympy.Expr:
    """f_ab, that is f_a differentiated by the argument b, also through y; in terms of f_a where that is cheaper."""
    trivial = {FIRSTS[i]: first for i, first in firsts.items() if _is_trivial(first)}
    if formula.second is not None:
        count = len(formula.first or formula.second)
        place = [(i, j) for i in range(count) for j in range(i, count)].index((a, b))
        return parse(formula.second[place]).subs(settings).subs(trivial)
    first = firsts[a]
    value = _without_jumps(sympy.diff(first, SYMBOLS[b]) + sympy.diff(first, Y) * FIRSTS[b]).subs(trivial)
    if _is_trivial(first) or value == 0:
        return value
    whole = value.subs(FIRSTS[b], firsts[b])
    candidates = [form.subs(first, FIRSTS[a]) for form in (value, whole)] + [value]
    if formula.expression:
        candidates.append(value.subs(parse(formula.expression).subs(settings), Y))
    if first.as_coeff_Mul()[1] == 1 / Y:
        candidates.append(whole.subs(Y, first.as_coeff_Mul()[0] / FIRSTS[a]))
    ratio = sympy.Add(*(term / first for term in sympy.Add.make_args(value)))
    if sympy.denom(ratio).is_number:  # divide by nothing that the first derivative does not divide by
        candidates.append(FIRSTS[a] * ratio)
    return _cheapest(candidates)


def _is_trivial(expression: sympy.Expr) -> bool:
    return bool(expression.is_number or expression.is_symbol)


def _without_jumps(derivative: sympy.Expr) -> sympy.Expr:
    """Without the delta functions at kinks: reverse mode has none."""
    return derivative.replace(sympy.DiracDelta, lambda *_: sympy.Integer(0))


def _cheapest(candidates: Sequence[sympy.Expr]) -> sympy.Expr:
    best = min(candidates, key=_cost)
    return min(best, sympy.factor_terms(best), key=_cost)


def _cost(expression: sympy.Expr) -> int:
    """How many tensor operations, each subexpression once; roots and transcendental functions count for more."""
    return sum(_weight(part) for part in set(sympy.preorder_traversal(expression)))


def _weight(part: Any) -> int:
    if _is_trivial(part):
        return 0
    if isinstance(part, (sympy.Add, sympy.Mul)):
        return len(part.args) - 1
    if isinstance(part, sympy.Pow) and part.exp.is_Rational:
        return (1 if part.exp in (-1, 2, 3) else 2 if part.exp.is_Integer else 4) + int(part.exp.is_negative)
    if isinstance(part, Boolean) or not isinstance(part, sympy.Expr):
        return 1
    return 10


def _source(firsts: dict[sympy.Symbol, sympy.Expr], values: dict[Pair, sympy.Expr], arity: int) -> str:
    """The code of a function of the arguments and y that returns the values."""
    needed = {FIRSTS[pair[0]] for pair in values if len(pair) == 1}
    seconds = [value for pair, value in values.items() if len(pair) == 2]
    needed |= {s for value in seconds for s in value.free_symbols if s in firsts}
    names = [name for name in firsts if name in needed]
    shared, reduced = sympy.cse([_numeric(e) for e in (*(firsts[n] for n in names), *seconds)], _temporaries())
    pending = [*shared, *zip(names, reduced[: len(names)], strict=True)]
    printer = _Printer()
    lines = [f"def derivatives({', '.join((*ARGUMENTS[:arity], 'y'))}):"]
    lines += [f"    {name} = {printer.doprint(value)}" for name, value in _in_order(pending)]
    second = iter(reduced[len(names) :])
    results = [FIRSTS[pair[0]] if len(pair) == 1 else next(second) for pair in values]
    lines.append(f"    return ({''.join(printer.doprint(r) + ', ' for r in results)})")
    return "\n".join(lines)


def _temporaries() -> Any:
    return sympy.numbered_symbols("t", real=True)


def _in_order(definitions: Sequence[tuple[sympy.Symbol, sympy.Expr]]) -> list[tuple[sympy.Symbol, sympy.Expr]]:
    """Definitions after those that they use."""
    ordered: list[tuple[sympy.Symbol, sympy.Expr]] = []
    pending = list(definitions)
    while pending:
        undefined = {name for name, _ in pending}
        ready = next(d for d in pending if not d[1].free_symbols & undefined)
        ordered.append(ready)
        pending.remove(ready)
    return ordered


def _numeric(expression: Any) -> Any:
    """With one number for every product of irrational constants, and 1/sqrt as one function."""
    if not isinstance(expression, sympy.Expr) or not expression.args:
        return _literal(expression) if getattr(expression, "is_NumberSymbol", False) else _numeric_parts(expression)
    if expression.is_number:
        return expression if expression.is_Rational else _literal(expression)
    if isinstance(expression, sympy.Mul):
        constants = [a for a in expression.args if a.is_number]
        if not all(a.is_Rational for a in constants):
            return _literal(sympy.Mul(*constants)) * sympy.Mul(
                *(_numeric(a) for a in expression.args if not a.is_number)
            )
    if isinstance(expression, sympy.Pow) and expression.exp == -sympy.S.Half:
        return _RSQRT(_numeric(expression.base))
    return _numeric_parts(expression)


def _numeric_parts(expression: Any) -> Any:
    return expression.func(*map(_numeric, expression.args)) if expression.args else expression


def _literal(number: sympy.Expr) -> sympy.Expr:
    """A number as a symbol of its own name, which sympy does not multiply into a sum."""
    value = float(number)
    return sympy.Symbol(repr(abs(value)), positive=True) * (1 if value >= 0 else -1)


_RSQRT = sympy.Function("rsqrt")


class _Printer(TorchPrinter):
    """sympy's torch printer, with conditions that take Python numbers, and values in the dtype of the output."""

    mapping = {op: name for op, name in TorchPrinter.mapping.items() if op not in (sympy.log, sympy.loggamma)}

    def __init__(self) -> None:
        super().__init__({"fully_qualified_modules": True, "inline": True, "allow_unknown_functions": True})

    def _print_Piecewise(self, expr: Piecewise) -> str:
        *rest, (last, _) = expr.args
        code = self._print(last)
        for value, condition in reversed(rest):
            code = f"select(y, {self._print(condition)}, {self._print(value)}, {code})"
        return code

    def _print_Function(self, expr: sympy.Function) -> str:
        if type(expr) in self.mapping:
            return super()._print_Function(expr)
        name = type(expr).__name__
        name = name if name in IMPLEMENTATIONS else f"torch.{name}"
        return f"{name}({', '.join(map(self._print, expr.args))})"

    _print_polygamma = _print_Function

    def _print_Relational(self, expr: Any) -> str:
        return f"({self._print(expr.lhs)} {expr.rel_op} {self._print(expr.rhs)})"

    def _print_And(self, expr: Any) -> str:
        return "(" + " & ".join(map(self._print, expr.args)) + ")"

    def _print_Or(self, expr: Any) -> str:
        return "(" + " | ".join(map(self._print, expr.args)) + ")"

    def _print_Float(self, expr: sympy.Float) -> str:
        return repr(float(expr))

    def _print_Pow(self, expr: sympy.Pow) -> str:
        """Operators, which take Python numbers as well."""
        if expr.exp == sympy.S.Half:
            return super()._print_Pow(expr)
        base = self.parenthesize(expr.base, PRECEDENCE["Pow"], strict=True)
        return f"1/{base}" if expr.exp == -1 else f"{base}**{self.parenthesize(expr.exp, PRECEDENCE['Pow'])}"


def _select(y: Tensor, condition: Any, true: Any, false: Any) -> Any:
    """where() as one node, that does not take the default dtype for two Python numbers."""
    if not isinstance(condition, Tensor):
        return true if condition else false
    if isinstance(true, Tensor):
        return (
            torch.where(condition, true, false)
            if isinstance(false, Tensor)
            else _where.ScalarOther(condition, true, false)
        )
    if not isinstance(false, Tensor):
        false = torch.scalar_tensor(false, dtype=y.dtype, device=y.device)
    return _where.ScalarSelf(condition, true, false)


_where = torch.ops.aten.where
