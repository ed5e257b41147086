"""Sink: what an expansion repeats is computed once, and expanded after.

Contract: a functional graph in, the same values out: f(expand(x)) is expand(f(x)) where f treats alike what is
repeated. Directions that are the same for all samples, and what layers make of them before anything depends on the
sample, so have one row in place of one for each sample. Of components only, as the model's own values are computed as
it says, and of no value that the graph returns, which is memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fomoh_fx.passes import provenance
from fomoh_fx.passes.dataflow import escapes
from fomoh_fx.passes.insertion import insert_before
from fomoh_fx.passes.simplify import value_of

aten = torch.ops.aten
#: Operands whose axes are those of the result, and which of these (from the last, -1, on) it mixes.
Operands = dict[fx.Node, set[int]]


def _elementwise(node: fx.Node) -> Operands:
    return {operand: set() for operand in node.all_input_nodes if value_of(operand) is not None}  # no numbers


def _rows(node: fx.Node) -> Operands:
    """x of x w^T + b; not where w is one vector, whose result lacks the last axis, nor where b differs between rows."""
    x, *others = cast("list[fx.Node]", node.args)
    ranks = [0 if (value := value_of(other)) is None else value.ndim for other in others]
    return {x: {-1}} if ranks[0] == 2 and max(ranks[1:], default=0) <= 1 and x not in others else {}


def _summed(node: fx.Node) -> Operands:
    x, dims, *keep = cast("tuple[fx.Node, list[int], Any]", node.args)
    value = value_of(x)
    if keep != [True] or value is None or not dims:  # no axes means all of them
        return {}
    return {x: {d % value.ndim - value.ndim for d in dims}}


#: The operators below which an expansion may move.
SINKS: dict[Any, Callable[[fx.Node], Operands]] = {
    aten.linear.default: _rows,
    aten.sum.dim_IntList: _summed,
    **dict.fromkeys(
        (aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.add.Tensor, aten.sub.Tensor), _elementwise
    ),
    **dict.fromkeys((aten.mul.Scalar, aten.div.Scalar), _elementwise),
}


def sink(module: fx.GraphModule) -> fx.GraphModule:
    """Move the expansions of components down, in order: a node's arguments are already in their final form."""
    for node in list(module.graph.nodes):
        if node.target in SINKS and provenance.of(node).component != "primal" and not escapes(node):
            _sink(node)
    module.recompile()
    return module


def _sink(node: fx.Node) -> None:
    value, operands = value_of(node), SINKS[node.target](node)
    if value is None or not any(operand.target is aten.expand.default for operand in operands):
        return
    axes = range(-value.ndim, 0)  # from the last on, as operands may have fewer
    kept = {d for d in axes if any(d in mixed or not _is_once(operand, d) for operand, mixed in operands.items())}
    smaller = {operand: _source(operand, kept) for operand in operands}
    if None in smaller.values():
        return
    sizes = [-1 if d in kept else _repeated(operands, d) for d in axes]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: smaller.get(n, n))
    once = insert_before(node, f"{node.name}_once", node.target, *args, **kwargs)
    whole = insert_before(node, f"{node.name}_expand", aten.expand.default, once, sizes)
    node.replace_all_uses_with(whole)
    node.graph.erase_node(node)


def _is_once(operand: fx.Node, axis: int) -> bool:
    """Whether the operand, or what it expands, has one element or none along an axis."""
    expanded = operand.args[0] if operand.target is aten.expand.default else operand
    return _is_equal(_size(expanded, axis), 1)


def _is_equal(a: Any, b: Any) -> bool:
    return a == b if isinstance(a, int) and isinstance(b, int) else statically_known_true(a == b)


def _size(node: Any, axis: int) -> Any:
    value = value_of(node)
    assert value is not None
    return value.shape[axis] if -axis <= value.ndim else 1


def _repeated(operands: Operands, axis: int) -> Any:
    """How often the operands are expanded along an axis: a number, or the node of a dynamic one."""
    expansions = [x for x in operands if x.target is aten.expand.default and not _is_equal(_size(x, axis), 1)]
    return expansions[0].args[1][axis] if expansions else 1  # type: ignore[index]


def _source(operand: fx.Node, kept: set[int]) -> fx.Node | None:
    """What the operand expands, unless it does so along one of these axes."""
    if operand.target is not aten.expand.default:
        return operand
    source = operand.args[0]
    assert isinstance(source, fx.Node)
    return None if any(not _is_equal(_size(source, d), _size(operand, d)) for d in kept) else source
