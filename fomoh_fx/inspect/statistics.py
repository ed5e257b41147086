"""Statistics: what was compiled, in figures."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fomoh_fx.hyperdual import SecondOrder
from fomoh_fx.passes import provenance
from fomoh_fx.passes.dataflow import bodies_of, graphs_in, root_of
from fomoh_fx.rules.registry import Operator, kind_of, spelled
from fomoh_fx.specialization import Specialization

aten = torch.ops.aten

#: The operators that do the work: products of matrices, and convolutions.
PRODUCTS = {
    aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.linear.default,
    aten.matmul.default, aten.mv.default, aten.dot.default, aten.addmv.default, aten.convolution.default,
    aten.scaled_dot_product_attention.default,
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What one specialisation is made of; ``str`` gives a table.

    Attributes:
        frontend: what captured the model.
        refused: what the frontends tried before it said.
        directions, second_order, crosses: K, the kind of second order, C.
        nodes: for each stage the number of nodes of each component (inputs, constants and the output not counted). What
            is in the body of a branch or loop counts once, here and below, however often it runs.
        inactive: primal operations that no asked-for derivative passes through, so that they have no component.
        zero_crosses: operations with a tangent whose cross component is structurally zero.
        simplified, merged, fused, dead: nodes that the passes of these names removed.
        served: how each operator on an active path is served, and how many times it occurs.
        products: for each component the number of matrix products and convolutions in the final graph.
        input_bytes: memory of the inputs: parameters, buffers, arguments and tangents.
        peak_bytes: the most memory of intermediate values at once, run operator by operator in the graph's order; None
            where sizes are symbolic.
    """

    frontend: str
    refused: Sequence[str]
    directions: int
    second_order: SecondOrder
    crosses: int
    nodes: Mapping[str, Mapping[str, int]]
    inactive: int
    zero_crosses: int
    simplified: int
    merged: int
    fused: int
    dead: int
    served: Mapping[str, tuple[str, int]] = field(repr=False)
    products: Mapping[str, int] = field(default_factory=dict)
    input_bytes: int | None = None
    peak_bytes: int | None = None

    def __str__(self) -> str:
        head = [
            ("captured by", self.frontend),
            *(("refused by", reason) for reason in self.refused),
            ("directions K", str(self.directions)),
            ("second order", f"{self.second_order}, C = {self.crosses}" if self.second_order else "none"),
            ("without components", f"{self.inactive} inactive operations, {self.zero_crosses} more without cross"),
            ("removed", f"{self.simplified} simplified, {self.merged} merged, {self.fused} fused, {self.dead} dead"),
            ("inputs", _size(self.input_bytes)),
            ("peak of intermediates", f"{_size(self.peak_bytes)} (estimate, operator by operator)"),
        ]
        rows: list[tuple[str, ...]] = [("nodes", *provenance.COMPONENTS, "all")]
        counts = {**self.nodes, "products in the last": self.products}
        for name, count in counts.items():
            parts = [count.get(component, 0) for component in provenance.COMPONENTS]
            rows.append((name, *map(str, parts), str(sum(parts))))
        served = [("operator", "served by", "times"), *((op, how, str(n)) for op, (how, n) in self.served.items())]
        return "\n\n".join("\n".join(_aligned(table)) for table in (head, rows, served)) + "\n"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [all(cell.isdigit() for cell in column[1:]) and len(column) > 1 for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]


def _size(count: int | None) -> str:
    if count is None:
        return "depends on symbolic sizes"
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def report(specialization: Specialization) -> Report:
    """The figures of one specialisation."""
    stages, components = specialization.stages, specialization.components
    counts = {name: _count_components(stage) for name, stage in stages.items()}
    totals = {name: count.total() for name, count in counts.items()}
    found = _components(stages["normalize"], stages["expand"])
    active = [n for n, parts in found.items() if len(parts) > 1]
    final = stages[list(stages)[-1]]
    return Report(
        frontend=specialization.program.frontend,
        refused=tuple(specialization.program.refused),
        directions=components.directions,
        second_order=components.second_order,
        crosses=components.count,
        nodes=counts,
        inactive=len(found) - len(active),
        zero_crosses=sum("cross" not in found[n] for n in active) if components.second_order else 0,
        simplified=totals["expand"] - totals["simplify"],
        merged=totals["simplify"] - totals["cse"],
        fused=totals["factors"] - totals["fuse"],
        dead=totals["fuse"] - totals["eliminate"],
        served=_served(active),
        products=_count_components(final, PRODUCTS),
        input_bytes=_total(_bytes(n) for n in final.graph.find_nodes(op="placeholder")),
        peak_bytes=peak_bytes(final.graph),
    )


def _count_components(module: fx.GraphModule, only: Collection[Operator] | None = None) -> Counter[str]:
    calls = [n for part in graphs_in(module) for n in part.graph.nodes if n.op == "call_function"]
    return Counter(provenance.of(n).component for n in calls if only is None or n.target in only)


def _components(module: fx.GraphModule, expanded: fx.GraphModule) -> dict[fx.Node, set[str]]:
    """The components that every operation of the normalised graph and its bodies has in the expanded one."""
    by_name = _components_by_name(expanded.graph)
    found: dict[fx.Node, set[str]] = {}
    for node in [n for n in module.graph.nodes if isinstance(n.target, Operator)]:
        found[node] = set().union(*(by_name.get(name, ()) for name in _names(node)))
        same = (n for n in expanded.graph.nodes if provenance.of(n).primal == node.name and n.target is node.target)
        bodies = bodies_of(node)
        for body, hyperdual in zip(bodies, bodies_of(next(same, node)) if bodies else (), strict=True):
            found |= _components(body, hyperdual)
    return found


def _components_by_name(graph: fx.Graph) -> dict[str, set[str]]:
    """The components that each primal node has in the expanded graph."""
    found: dict[str, set[str]] = {}
    for node in graph.nodes:
        origin = provenance.of(node)
        found.setdefault(origin.primal, set()).add(origin.component)
    return found


def _names(node: fx.Node) -> list[str]:
    """The primal names that an operation's results go by: its own, and those of its outputs."""
    return [node.name, *(user.name for user in node.users if user.target is operator.getitem)]


def _served(active: Sequence[fx.Node]) -> dict[str, tuple[str, int]]:
    times = sorted(Counter(n.target for n in active).items(), key=lambda item: str(item[0]))
    return {spelled(op): (kind_of(op), n) for op, n in times}


def _bytes(node: fx.Node) -> int | None:
    """The memory of a node's own values, or None where a size is symbolic."""
    sizes = [v.numel() * v.element_size() for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    return _total(size if isinstance(size, int) else None for size in sizes)


def _total(sizes: object) -> int | None:
    listed = list(sizes)  # type: ignore[call-overload]
    return None if None in listed else sum(listed)


def peak_bytes(graph: fx.Graph) -> int | None:
    """The most memory that intermediate values take at once, in the graph's order; views take none of their own.

    A value is released after its last use, or the last use of a view of it; inputs and constants are not counted. A
    branch or loop takes its results and what one run of its bodies takes at most.
    """
    last_use: dict[fx.Node, int] = {}
    for time, node in enumerate(graph.nodes):
        for used in node.all_input_nodes:
            last_use[root_of(used)] = time
    released: dict[int, int] = {}
    live = peak = 0
    for time, node in enumerate(graph.nodes):
        if node.op == "call_function" and root_of(node) is node:
            size = _bytes(node)
            inside = [peak_bytes(body.graph) for body in bodies_of(node)]
            if size is None or None in inside:
                return None
            live += size
            peak = max(peak, live + max(filter(None, inside), default=0))
            end = last_use.get(node, time)
            released[end] = released.get(end, 0) + size
        live -= released.pop(time, 0)
    return peak
