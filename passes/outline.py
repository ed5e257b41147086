"""Outline: what a graph repeats, layer after layer, becomes one region that it calls, so that it is compiled once.

Contract: a functional graph in, one that computes the same values in the same order out. A region is a stretch of
nodes that occurs several times, one right after the other: the same operators, sizes, dtypes and layouts, with the same
of their operands computed inside. Neither two values that a region takes share memory, nor one that it returns with
another or with one that it takes. Stretches begin where the fewest numbers pass from one to the next.
"""

# Dynamo's own use_graph_deduplication grows equal regions from every node: on 12 layers it found many small ones and
# took nearly as long as without (63 of 73 s), and the program was slower.

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fomoh_fx.passes.dataflow import bodies_of, is_assertion, owner_of
from fomoh_fx.sizes import known

#: Nodes of a region, from which on compiling it once is worth its calls.
LEAST_NODES = 60
#: Times that a region runs, at least.
FEWEST_RUNS = 3
#: How many of the repetitions that save most are tried, and for each how many of the narrowest places to begin.
TRIED, TRIED_PLACES = 4, 32

#: What the runs of a region take from outside at one place: one node for each run.
Column = tuple[fx.Node, ...]


@dataclass(frozen=True)
class Repetition:
    """``stretches[t][q]`` does in run t what ``stretches[0][q]`` does in the first.

    Attributes:
        first: the place of the first node in the list in which this was found.
        stretches: for each run its nodes.
        columns: the values that the runs take from outside, each different column once.
        returned: the places q of the values that are used outside.
    """

    first: int
    stretches: list[list[fx.Node]]
    columns: list[Column]
    returned: list[int]

    @property
    def end(self) -> int:
        return self.first + sum(map(len, self.stretches))


def outline(module: fx.GraphModule) -> fx.GraphModule:
    """Call one function in place of each stretch that repeats, those that save the most nodes first."""
    pending = [[node for node in module.graph.nodes if node.op == "call_function"]]
    while pending:
        nodes = pending.pop()
        found = _largest(nodes)
        if found is not None:
            pending += [nodes[: found.first], nodes[found.end :]]
            _replace(module.graph, found)
    module.recompile()
    return module


def _largest(nodes: list[fx.Node]) -> Repetition | None:
    """The repetition that saves the most nodes, of those that can be cut."""
    kinds = _kinds(nodes)
    periodic = (
        (end - start - period, -period, start, end)
        for period in range(LEAST_NODES, len(nodes) // FEWEST_RUNS + 1)
        for start, end in _periodic(kinds, period)
    )
    for _, period, start, end in sorted(periodic, reverse=True)[:TRIED]:
        if (found := _cut(nodes, start, end, -period)) is not None:
            return found
    return None


def _kinds(nodes: Sequence[fx.Node]) -> Tensor:
    """[N]: equal numbers for nodes that do the same to values of the same sizes, dtypes and layouts."""
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(_kind(node), len(numbers)) for node in nodes])


def _kind(node: fx.Node) -> Any:
    if bodies_of(node) or is_assertion(node):  # equal to no other: a body is no value, an assertion has none
        return node
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    described = [_described(leaf.meta.get("val")) if isinstance(leaf, fx.Node) else repr(leaf) for leaf in leaves]
    return node.target, tuple(described), spec, _described(node.meta.get("val"))


def _described(value: Any) -> str:
    parts = pytree.tree_leaves(value)
    return str([(p.shape, p.stride(), p.dtype, p.device) if isinstance(p, Tensor) else p for p in parts])


def _periodic(kinds: Tensor, period: int) -> Iterator[tuple[int, int]]:
    """Every [start, end) long enough in which each node is of the same kind as the one a period later."""
    changes = torch.nonzero(kinds[:-period] != kinds[period:]).flatten().tolist()
    for before, change in zip([-1, *changes], [*changes, len(kinds) - period], strict=True):
        start, end = before + 1, change + period
        if end - start >= FEWEST_RUNS * period:
            yield start, end


def _cut(nodes: list[fx.Node], start: int, end: int, period: int) -> Repetition | None:
    """The repetition within [start, end) that begins where the fewest numbers pass, and of these the earliest."""
    passing = _numbers_passing(nodes)
    firsts = range(start, min(start + 2 * period, end - FEWEST_RUNS * period + 1))
    for first in sorted(firsts, key=lambda place: passing[place + period])[:TRIED_PLACES]:
        starts = range(first, end - period + 1, period)
        if (found := _repetition([nodes[s : s + period] for s in starts], first)) is not None:
            return found
    return None


def _numbers_passing(nodes: Sequence[fx.Node]) -> list[int]:
    """For each place in the list, how many numbers are computed before it and used from it on."""
    position = {node: place for place, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 2)
    for place, node in enumerate(nodes):
        size = sum(known(v.numel()) or 0 for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor))
        change[place + 1] += size
        change[max((position.get(user, len(nodes)) for user in node.users), default=place) + 1] -= size
    return list(accumulate(change))


def _repetition(stretches: list[list[fx.Node]], first: int) -> Repetition | None:
    """The stretches as runs of one region, or None where they are wired differently or return shared memory."""
    places = [{node: q for q, node in enumerate(stretch)} for stretch in stretches]
    columns: dict[Column, None] = {}
    for column in _columns(stretches):
        inside = {of.get(node) for of, node in zip(places, column, strict=True)}
        if inside == {None}:
            columns[column] = None
        elif len(inside) > 1:
            return None
    if any(len(set(map(owner_of, run))) < len(columns) for run in zip(*columns, strict=True)):
        return None  # Dynamo takes no two operands that share memory
    returned = [
        q
        for q, runs in enumerate(zip(*stretches, strict=True))
        if any(user not in of for of, node in zip(places, runs, strict=True) for user in node.users)
    ]
    values = [stretches[0][q] for q in returned]
    owners = {owner_of(node) for node in values}
    if len(owners) < len(values) or not owners <= places[0].keys():
        return None
    if not all(isinstance(node.meta.get("val"), Tensor) for node in values):
        return None
    return Repetition(first, stretches, list(columns), returned)


def _columns(stretches: list[list[fx.Node]]) -> Iterator[Column]:
    """What the runs take at each place at which a node takes a value, in order."""
    for runs in zip(*stretches, strict=True):
        yield from zip(*map(_taken, runs), strict=True)


def _taken(node: fx.Node) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]


def _replace(graph: fx.Graph, found: Repetition) -> None:
    """Every run of the repetition becomes a call of one region."""
    region = _region(found)
    now: dict[fx.Node, fx.Node] = {}  # what a run returned, now taken from its call
    for run, stretch in enumerate(found.stretches):
        operands = tuple(now.get(column[run], column[run]) for column in found.columns)
        with graph.inserting_after(stretch[-1]):
            call = graph.call_function(region, (None, *operands))
        call.meta["val"] = tuple(stretch[q].meta["val"] for q in found.returned)
        for number, q in reversed(list(enumerate(found.returned))):
            with graph.inserting_after(call):
                item = graph.call_function(operator.getitem, (call, number))
            item.meta = stretch[q].meta
            stretch[q].replace_all_uses_with(item)
            now[stretch[q]] = item
        for node in reversed(stretch):
            graph.erase_node(node)


def _region(found: Repetition) -> Callable[..., Any]:
    """A function of nothing and of what a run takes from outside, which ``torch.compile`` compiles once."""
    body = fx.GraphModule({}, _body(found))
    function = type(body).forward  # takes the module, which it does not need
    region = torch.compiler.nested_compile_region(function)
    # Dynamo compares the graphs of runs whose operands differ in more than it can see without tracing them, at most so
    # many times; PyTorch 2.11 has no limit, and no argument for it
    function.__marked_compile_region_max_reuse_entries__ = len(found.stretches)  # type: ignore[attr-defined]
    region.__module__, region.__name__ = __name__, "region"  # as the generated code writes the call
    return region


def _body(found: Repetition) -> fx.Graph:
    """What the first run computes from what it takes from outside."""
    graph, stretch = fx.Graph(), found.stretches[0]
    operands = {column: graph.placeholder(f"operand_{i}") for i, column in enumerate(found.columns)}
    copies: dict[fx.Node, fx.Node] = {}
    columns = _columns(found.stretches)
    for node in stretch:
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, fx.Node):
                column = next(columns)
                leaves[i] = operands[column] if column in operands else copies[leaf]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        copies[node] = graph.create_node("call_function", node.target, args, kwargs, node.name)
        copies[node].meta = node.meta
    graph.output(tuple(copies[stretch[q]] for q in found.returned))
    return graph
