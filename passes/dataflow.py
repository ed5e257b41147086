"""Dataflow: who uses what, and who shares memory with what. Reads the graph, changes nothing."""

from __future__ import annotations

import operator

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


def escapes(node: fx.Node) -> bool:
    """Whether the graph returns the value, or a view of it."""
    return any(user.op == "output" or (_passes_on(user, node) and escapes(user)) for user in node.users)


def _passes_on(user: fx.Node, node: fx.Node) -> bool:
    return user.target is operator.getitem or (is_view(user) and user.args[0] is node)
