"""The table of rules: which operator is served by what.

A rule is called as ``rule(op, components, *args, **kwargs)`` with a HyperDual wherever an argument has a tangent or
a cross component, and returns a HyperDual (a tuple of them for several outputs; plain tensors are constants). It is
written in torch functions on stacked components, so the same rule runs eagerly in a test and re-traced in a graph.
A composite is not a rule but a body in terms of other operators, inlined when the graph is normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch._library.custom_ops import CustomOpDef
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from fomoh_fx.custom_functions import FUNCTIONS, body_of_operator, is_function, operator_of, rule_of_operator
from fomoh_fx.errors import ArgumentError
from fomoh_fx.functional_forms import CHANGING, changes_arguments, functional_form
from fomoh_fx.triton_kernels import is_kernel, operator_of_kernel

Operator = OpOverload | HigherOrderOperator
Rule = Callable[..., Any]

RULES: dict[Operator, Rule] = {}
FACTORED: dict[Operator, Rule] = {}  # for tangents of low rank: rules/low_rank.py; others have them multiplied out
GIVEN: dict[Operator, int] = {}  # how often register_rule served an operator
COMPOSITES: dict[Operator, Callable[..., Any]] = {}
KINDS: dict[Any, str] = {}  # looked up by the target of any node
DEFAULT: list[Callable[[Operator], Rule]] = []  # one maker of rules for operators without: rules/fallback.py


class Composite:
    """A body in terms of operators that have rules: ``Composite(body)`` takes the operator's own arguments."""

    def __init__(self, body: Callable[..., Any]) -> None:
        if not callable(body):
            raise ArgumentError(f"body: expected a function of the operator's arguments, got {body!r}")
        self.body = body


def overloads(ops: Any) -> list[Operator]:
    """Every overload that computes a new value (no ``out=`` variant) of an operator, a packet or several of them."""
    if isinstance(ops, OpOverloadPacket):
        found = [_functional(getattr(ops, name)) for name in ops.overloads()]
        return [op for op in found if not op._schema.is_mutable and "Dimname" not in str(op._schema)]
    if isinstance(ops, CustomOpDef):
        return [_functional(ops._opoverload)]
    if isinstance(ops, OpOverload):
        return [_functional(ops)]
    if isinstance(ops, HigherOrderOperator):
        return [ops]
    if is_function(ops):
        return [operator_of(ops)]
    if is_kernel(ops):
        return [operator_of_kernel(ops)]
    if isinstance(ops, Iterable) and not isinstance(ops, str):
        return [overload for op in ops for overload in overloads(op)]
    raise ArgumentError(
        f"op: expected an operator such as torch.ops.aten.tanh.default, a subclass of torch.autograd.Function or a "
        f"Triton kernel, got {ops!r}"
    )


def _functional(op: OpOverload) -> OpOverload:
    return functional_form(op) if changes_arguments(op) else op


def register(ops: Any, rule: Rule | Composite, kind: str | None = None) -> None:
    """Serve the operators (overloads, whole packets, or an iterable of them) by the rule."""
    for op in overloads(ops):
        RULES.pop(op, None)
        COMPOSITES.pop(op, None)
        if isinstance(rule, Composite):
            COMPOSITES[op] = body_of_operator(rule.body) if op in FUNCTIONS else rule.body
            KINDS[op] = "composite"
        else:
            RULES[op] = rule_of_operator(rule) if op in FUNCTIONS else rule
            KINDS[op] = getattr(rule, "kind", "own rule") if kind is None else kind


def rule_for(op: Operator) -> Rule:
    """The operator's own rule, or a synthesised one."""
    return RULES[op] if op in RULES else DEFAULT[0](op)


def kind_of(op: Any) -> str:
    """How an operator is served: the kind of its own rule, or where its derivative comes from without one."""
    return KINDS.get(op, "its backward" if op in FUNCTIONS else "synthesised")


def register_rule(op: Any, rule: Rule | Composite) -> None:
    """Teach fomoh_fx the derivatives of an operator, a custom autograd Function or a Triton kernel.

    What was registered last serves, in place of a rule of fomoh_fx's own, of a synthesised one, and of a Function's
    backward::

        fomoh_fx.register_rule(torch.ops.mylib.swish.default, elementwise("x*sigmoid(x)"))
        fomoh_fx.register_rule(MyFunction, bilinear(0, 1))

        def rule(op, components, x, factor):  # of MyScale.apply(x, factor), where x is active
            tangent, cross = (None if part is None else part * factor for part in (x.tangent, x.cross))
            return HyperDual(op(x.primal, factor), tangent, cross)

        fomoh_fx.register_rule(MyScale, rule)

    A rule sees the arguments of the operator, of ``MyFunction.apply``, or of the kernel, with a
    :class:`~fomoh_fx.HyperDual` wherever one has a derivative: the primal in the argument's shape, the tangent
    ``[K, *shape]`` and the cross component ``[C, *shape]``, each None where it is zero. It returns what the operator
    does, with a HyperDual for each tensor that has a derivative. Of an operator that changes arguments that is what
    it returns and then the new value of each of these; of a kernel, of each tensor that it writes. ``op`` can be
    called: in the graph that is one call of the operator (of a Function's forward, without its backward).

    Args:
        op: an overload such as ``torch.ops.mylib.swish.default``, a packet for all of its overloads, what
            ``torch.library.custom_op`` or ``triton_op`` returns, a subclass of ``torch.autograd.Function``, or a
            Triton kernel.
        rule: made by a function of ``fomoh_fx.rules.kinds``,

            - ``elementwise("x*sigmoid(x)")``: one sympy expression, from which the derivatives are derived,
            - ``gated(lambda y, x: y > 0)``: derivative one where the gate is open, zero elsewhere,
            - ``linear()``: linear in its one active argument,
            - ``bilinear(0, 1)``: linear in each of two arguments,
            - ``constant()``: derivative zero wherever it exists,
            - ``from_jvp(push)``: the first derivative as a function, from which the second is derived,
            - ``Composite(body)``: the same value in terms of other operators;

            or any callable ``rule(op, components, *args, **kwargs)`` as described in
            :mod:`fomoh_fx.rules.registry`.

    Raises:
        ArgumentError: ``op`` is none of these, or an operator of PyTorch's own that changes its arguments, or
            ``rule`` is neither callable nor a Composite.
    """
    if not callable(rule) and not isinstance(rule, Composite):
        raise ArgumentError(f"rule: expected a rule or a Composite, got {rule!r}")
    ops = overloads(op)
    if not ops or any(isinstance(o, OpOverload) and o._schema.is_mutable for o in ops):
        raise ArgumentError(f"op: {op} changes its arguments; graphs have functional operators only, so register those")
    register(ops, rule)
    for known in ops:
        FACTORED.pop(known, None)
        GIVEN[known] = GIVEN.get(known, 0) + 1


def supported_ops() -> dict[str, str]:
    """Every operator with a rule of its own, by name, and the kind of that rule, sorted.

    Operators that are not listed are decomposed by PyTorch or served by a synthesised rule where that is exact.
    """
    return {name: kind for name, kind in sorted((_name(op), kind) for op, kind in KINDS.items())}


def _name(op: Operator) -> str:
    if op in FUNCTIONS:
        return spelled(op)
    op = CHANGING.get(op, op)
    return op.name() if isinstance(op, (OpOverload, HigherOrderOperator)) else str(op)


def spelled(op: Any) -> str:
    """The operator as its user wrote it."""
    return FUNCTIONS[op].__qualname__.rpartition("<locals>.")[2] if op in FUNCTIONS else str(CHANGING.get(op, op))
