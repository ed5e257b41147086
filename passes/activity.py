"""Activity analysis: which nodes carry a derivative that somebody asked for.

*varied* = depends on a seeded input; *useful* = an asked-for output depends on it; *active* = both (Griewank and
Walther, Evaluating Derivatives, section 6.2). Contract: reads the graph, changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import networkx
import torch
from torch import fx

from fomoh_fx.passes.dataflow import dependencies
from fomoh_fx.rules.registry import KINDS


@dataclass(frozen=True)
class Activity:
    """The sets of nodes that are varied, useful, and both."""

    varied: frozenset[fx.Node]
    useful: frozenset[fx.Node]

    @property
    def active(self) -> frozenset[fx.Node]:
        return self.varied & self.useful


def carries_derivative(node: fx.Node) -> bool:
    """Whether a derivative can pass through the node: no integer, boolean or Python number, no constant operator."""
    value = node.meta.get("val")
    if isinstance(
        value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)
    ):  # item() stops, as reverse mode does
        return False
    if isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex()):
        return False
    return KINDS.get(node.target) != "constant"  # type: ignore[arg-type]


def analyse(graph: fx.Graph, seeds: Collection[fx.Node], asked: Collection[fx.Node]) -> Activity:
    """The activity of every node for the seeded inputs and the asked-for nodes."""
    flow = dependencies(graph)
    flow.remove_nodes_from([n for n in graph.nodes if n.op == "call_function" and not carries_derivative(n)])
    varied, useful = set(seeds), {n for n in asked if n in flow}
    for seed in seeds:
        varied |= networkx.descendants(flow, seed)
    for node in tuple(useful):
        useful |= networkx.ancestors(flow, node)
    return Activity(frozenset(varied), frozenset(useful))


def ancestors(graph: fx.Graph, nodes: Collection[fx.Node]) -> frozenset[fx.Node]:
    """The nodes and everything that they depend on."""
    flow = dependencies(graph)
    return frozenset(nodes).union(*(networkx.ancestors(flow, node) for node in nodes))


def descendants(graph: fx.Graph, nodes: Collection[fx.Node]) -> frozenset[fx.Node]:
    """The nodes and everything that depends on them, derivative or not."""
    flow = dependencies(graph)
    return frozenset(nodes).union(*(networkx.descendants(flow, node) for node in nodes))
