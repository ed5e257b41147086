"""Dataflow: who uses what, who shares memory with what, and which graphs lie inside. Reads, changes nothing."""

from __future__ import annotations

import operator
from operator import attrgetter

import networkx
import torch
from torch import fx
from torch._ops import OpOverload


def dependencies(graph: fx.Graph) -> networkx.DiGraph:
    """The dataflow graph: an edge from every node to each of its users."""
    flow = networkx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((producer, node) for node in graph.nodes for producer in node.all_input_nodes)
    return flow


def graphs_in(module: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph, and those of the bodies of its higher-order operators, of the bodies inside them, and so on."""
    return [part for part in module.modules() if isinstance(part, fx.GraphModule)]


def bodies_of(node: fx.Node) -> list[fx.GraphModule]:
    """The bodies that a higher-order operator takes, in order."""
    module = node.graph.owning_module
    taken = [attrgetter(str(n.target))(module) for n in node.all_input_nodes if n.op == "get_attr"]
    return [body for body in taken if isinstance(body, fx.GraphModule)]


def is_effect(node: fx.Node) -> bool:
    """Whether the node is not there for its value only: an input, the output, a call that has an effect."""
    return is_effectful_call(node) if node.op == "call_function" else node.op in ("placeholder", "output")


def is_effectful_call(node: fx.Node) -> bool:
    """Whether the node asserts or draws random numbers: others draw what comes after these."""
    if node.op != "call_function":
        return False
    inside = (n for body in bodies_of(node) for n in body.graph.nodes)
    return is_assertion(node) or draws(node.target) or any(is_effectful_call(n) for n in inside)


def is_assertion(node: fx.Node) -> bool:
    """Whether the node is a call that returns nothing."""
    return isinstance(node.target, OpOverload) and not node.target._schema.returns


def draws(target: object) -> bool:
    """Whether it is an operator that draws random numbers."""
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def is_view(node: fx.Node) -> bool:
    """Whether the node's value may be memory of its first argument."""
    if node.target is operator.getitem:
        return is_view(node.args[0])  # type: ignore[arg-type]
    if not isinstance(node.target, OpOverload):
        return False
    if node.target is torch.ops.aten._unsafe_view.default:  # a view that its schema does not declare
        return True
    return any(argument.alias_info is not None for argument in node.target._schema.arguments)


def root_of(node: fx.Node) -> fx.Node:
    """The node that owns the memory."""
    while node.op == "call_function" and (is_view(node) or node.target is operator.getitem):
        node = node.args[0]  # type: ignore[assignment]
    return node


def owner_of(node: fx.Node) -> fx.Node:
    """The node that owns the memory, where each output of an operator that has several owns its own."""
    while node.op == "call_function" and is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def escapes(node: fx.Node) -> bool:
    """Whether the graph returns the value, or a view of it."""
    return any(user.op == "output" or (_passes_on(user, node) and escapes(user)) for user in node.users)


def _passes_on(user: fx.Node, node: fx.Node) -> bool:
    return user.target is operator.getitem or (is_view(user) and user.args[0] is node)
