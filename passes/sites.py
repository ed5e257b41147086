"""Sites: where parameters act, and the points at which the gradient of their outputs is worth guessing.

A parameter acts in a product (linear, convolution, embedding, ..) or in a scaling or a sum. From there the value goes
on through operators that keep elements apart (elementwise operators, reshapes, selections, sums) to a *point*: the
last value before something mixes elements, or two things use it. The gradient at a point is pulled back to every
parameter before it by the transposes of these single operators, so that a guess there has no noise on what cannot
matter (a unit that is off, a pixel that lost its pool). Contract: reads the graph, changes nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from fomoh_fx.passes.activity import analyse, carries_derivative, descendants
from fomoh_fx.passes.transposes import LAYOUT, PRODUCTS, transpose_of
from fomoh_fx.rules.registry import KINDS

aten = torch.ops.aten
SUMS = {aten.sum.default, aten.mean.default, aten.sum.dim_IntList, aten.mean.dim}
Edge = tuple[fx.Node, fx.Node]  # a value, and the argument of its operator that leads back to a parameter


@dataclass
class Point:
    """A value at which a gradient is guessed, and the way back from it to its parameters, as edges of the graph.

    ``sites`` are the values where the parameters act: the first on each way that differ from sample to sample. The
    edges ``onwards`` lead from the value through other layouts of it.
    """

    node: fx.Node
    edges: set[Edge] = field(default_factory=set)
    parameters: dict[fx.Node, None] = field(default_factory=dict)
    sites: dict[fx.Node, None] = field(default_factory=dict)
    onwards: list[Edge] = field(default_factory=list)

    def in_other_layouts(self) -> Iterator[Point]:
        """The same point, placed further on."""
        for i, (node, _) in enumerate(self.onwards):
            yield replace(self, node=node, edges=self.edges | set(self.onwards[: i + 1]), onwards=[])


def find_points(graph: fx.Graph, parameters: Sequence[fx.Node], data: Sequence[fx.Node], loss: fx.Node) -> list[Point]:
    """The points of a normalised graph, the last in the graph first.

    Args:
        graph: the normalised graph.
        parameters: the placeholders to train.
        data: the placeholders that differ from sample to sample.
        loss: the node of the loss.
    """
    active = analyse(graph, parameters, [loss]).active
    sampled = descendants(graph, data)
    found: dict[fx.Node, Point] = {}
    for parameter in parameters:
        for end, edges, onwards in _ways(parameter, active, sampled):
            point = found.setdefault(end, Point(end, onwards=onwards))
            point.edges.update(edges)
            point.parameters[parameter] = None
            point.sites[next((user for user, _ in edges if user in sampled), end)] = None
    order = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(found.values(), key=lambda p: order[p.node], reverse=True)


def lost_ways(
    graph: fx.Graph, parameters: Sequence[fx.Node], data: Sequence[fx.Node], loss: fx.Node
) -> dict[fx.Node, fx.Node]:
    """The parameters that also act in a way that no point has the gradient of, and a node where that is so."""
    active = analyse(graph, parameters, [loss]).active
    sampled = descendants(graph, data)
    found: dict[fx.Node, fx.Node] = {}
    for parameter in parameters:
        own = {parameter, *descendants(graph, [parameter])} & (set(active) - set(sampled))
        before = (node for node in graph.nodes if node in own)
        lost = (user for node in before for user in node.users if user in active and not leads(user, node))
        if (first := next(lost, None)) is not None:
            found[parameter] = first
    return found


def _ways(
    parameter: fx.Node, active: Collection[fx.Node], sampled: Collection[fx.Node]
) -> Iterator[tuple[fx.Node, list[Edge], list[Edge]]]:
    """Every way from a parameter to a point, and the edges behind the point that only change its layout."""
    pending: list[tuple[fx.Node, list[Edge]]] = [(parameter, [])]
    while pending:
        node, way = pending.pop()
        users = [u for u in node.users if u in active]
        if node in sampled and (len(users) != 1 or not _passes(users[0], node)):
            onwards: list[Edge] = []
            while way and way[-1][0] is node and node.target in LAYOUT:  # samples are easier to tell before it
                onwards.insert(0, way[-1])
                node, way = way[-1][1], way[:-1]
            if isinstance(node.meta.get("val"), Tensor):
                yield node, way, onwards
            continue
        for user in users:
            if node in sampled or leads(user, node):
                pending.append((user, [*way, (user, node)]))


def leads(user: fx.Node, node: fx.Node) -> bool:
    """Whether the gradient at ``user`` can be pulled back to its argument ``node``."""
    if user.target is operator.getitem:
        return bool(user.args[1] == 0)
    if user.target is aten.native_dropout.default:
        return True
    return is_diagonal(user, node) or any(transpose_of(user.target, i) for i in positions(user, node))


def _passes(user: fx.Node, node: fx.Node) -> bool:
    """Whether a point is better placed behind ``user``: it keeps elements apart, and does not repeat them."""
    before, after = node.meta.get("val"), user.meta.get("val")
    if user.target in PRODUCTS or not leads(user, node):
        return False
    if user.op == "output" or not carries_derivative(user):
        return False
    sizes = [v.numel() if isinstance(v, Tensor) else 0 for v in (before, after)]
    return bool(isinstance(after, (tuple, list)) or sizes[0] == 0 or sizes[1] <= sizes[0])


def is_diagonal(user: fx.Node, node: fx.Node) -> bool:
    """Whether the derivative with respect to ``node`` is one factor for each element."""
    if transpose_of(user.target, 0) or KINDS.get(user.target) not in ("elementwise", "gated"):  # type: ignore[arg-type]
        return False
    before, after = node.meta.get("val"), user.meta.get("val")
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape == after.shape


def positions(user: fx.Node, node: fx.Node) -> list[int]:
    """Where ``node`` stands among the arguments of ``user``."""
    return [i for i, arg in enumerate(user.args) if arg is node]


def reductions(graph: fx.Graph, parameters: Sequence[fx.Node], loss: fx.Node) -> list[fx.Node]:
    """The values before the loss's last sums and means: walked back from the loss through values of one element."""
    varied = analyse(graph, parameters, [loss]).active
    found: dict[fx.Node, None] = {}
    pending = [loss]
    while pending:
        node = pending.pop()
        for argument in node.all_input_nodes:
            value = argument.meta.get("val")
            if argument not in varied or not isinstance(value, Tensor):
                continue
            if value.ndim == 0:
                pending.append(argument)
            elif node.target in SUMS:
                found[argument] = None
            else:
                return []
    return list(found)
