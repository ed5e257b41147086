"""Prune: a higher-order operator returns, carries and takes only what somebody uses.

Contract: a higher-order operator of a functional graph in; the same operator with fewer outputs and operands out,
rewritten in place with its bodies and its users. An output that nobody takes out goes, a value that a loop carries
goes if it serves itself only, and an operand goes that no body reads.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fomoh_fx.passes.activity import ancestors
from fomoh_fx.passes.dataflow import bodies_of, is_effect, is_effectful_call

higher_order = torch.ops.higher_order


@dataclass(frozen=True)
class Form:
    """How the arguments of a higher-order operator meet its bodies.

    Attributes:
        operands: the arguments that hold the inputs of every body, in order.
        carried: the first of these holds the initial values of the first outputs.
        asks: the first body returns a condition, not the outputs.
        needed: the argument that may not become empty, if any.
    """

    operands: tuple[int, ...]
    carried: bool = False
    asks: bool = False
    needed: int | None = None


FORMS: dict[Any, Form] = {
    higher_order.cond: Form((3,)),
    higher_order.while_loop: Form((2, 3), carried=True, asks=True),
    higher_order.scan: Form((1, 2, 3), carried=True, needed=2),
    higher_order.map_impl: Form((1, 2), needed=1),
}


def form_of(node: fx.Node) -> Form | None:
    """The form of an operator that can be pruned."""
    return FORMS.get(node.target) if not node.kwargs else None


def operands_of(node: fx.Node, form: Form) -> list[Any]:
    """What the bodies are given, in the order of their inputs."""
    return [value for i in form.operands if i < len(node.args) for value in node.args[i]]  # type: ignore[union-attr]


def prune_outputs(node: fx.Node) -> None:
    """Drop the outputs that nobody takes out, and what is carried for them; what computes them is dead then."""
    form, bodies = form_of(node), bodies_of(node)
    if form is None or not node.users or any(user.target is not operator.getitem for user in node.users):
        return
    producers = bodies[1:] if form.asks else bodies
    returned = [body.graph.output_node().args[0] for body in producers]
    if not all(isinstance(values, (tuple, list)) for values in returned):
        return
    kept = _kept(node, form, producers)
    if len(kept) == len(returned[0]):  # type: ignore[arg-type]
        return
    for body, values in zip(producers, returned, strict=True):
        body.graph.output_node().args = (_items(values, kept),)
    for user in list(node.users):
        user.update_arg(1, kept.index(user.args[1]))  # type: ignore[arg-type]
    node.meta["val"] = _items(node.meta["val"], kept)
    for body in bodies:
        body.graph.eliminate_dead_code(is_impure_node=is_effect)
    for i in reversed([i for i in range(_carried(node, form)) if i not in kept]):
        _drop_operand(node, form, i)


def prune_operands(node: fx.Node) -> None:
    """Drop the operands that no body reads; what is carried stays, for it is an output too."""
    form = form_of(node)
    if form is None:
        return
    for i in reversed(range(_carried(node, form), len(operands_of(node, form)))):
        if not any(body.graph.find_nodes(op="placeholder")[i].users for body in bodies_of(node)):
            _drop_operand(node, form, i)


def _carried(node: fx.Node, form: Form) -> int:
    return len(node.args[form.operands[0]]) if form.carried else 0  # type: ignore[arg-type]


def _kept(node: fx.Node, form: Form, producers: Sequence[fx.GraphModule]) -> list[int]:
    """The outputs that somebody takes out, and the carried ones that they, a condition or an assertion depend on."""
    kept: set[Any] = {user.args[1] for user in node.users}
    carried = range(_carried(node, form))
    while new := {i for i in carried if i not in kept and _is_read(node, producers, i, kept)} or (
        {0} if carried and kept.isdisjoint(carried) else set()  # a loop carries something
    ):
        kept |= new
    return sorted(kept)


def _is_read(node: fx.Node, producers: Sequence[fx.GraphModule], i: int, kept: Collection[int]) -> bool:
    for body in bodies_of(node):
        results = body.graph.output_node().args[0]
        asked = [results[j] for j in kept] if body in producers else [results]  # type: ignore[index]
        effects = [n for n in body.graph.nodes if is_effectful_call(n)]
        reads = ancestors(body.graph, [*effects, *(n for n in asked if isinstance(n, fx.Node))])
        if body.graph.find_nodes(op="placeholder")[i] in reads:
            return True
    return False


def _drop_operand(node: fx.Node, form: Form, i: int) -> None:
    """Drop the operand number i and the input of every body that stands for it."""
    at = i
    for position in form.operands:
        values: Any = node.args[position]
        if at < len(values):
            if len(values) > 1 or position != form.needed:
                node.update_arg(position, _items(values, [j for j in range(len(values)) if j != at]))
                for body in bodies_of(node):
                    body.graph.erase_node(body.graph.find_nodes(op="placeholder")[i])
            return
        at -= len(values)


def _items(values: Any, kept: Sequence[int]) -> Any:
    return type(values)(values[i] for i in kept)
