"""Label: the nodes that a rule has just recorded get their provenance, and names that a person can follow.

The result of the primal node ``tanh`` is called ``tanh``, its components ``tanh_tangent`` and ``tanh_cross``, and what
is computed on the way to one of them ``tanh_cross_mul``. A node that several components need belongs to the first.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module
from torch.utils import _pytree as pytree

from fomoh_fx.hyperdual import HyperDual, Undefined
from fomoh_fx.low_rank import LowRank, factors
from fomoh_fx.passes.dataflow import bodies_of
from fomoh_fx.passes.provenance import COMPONENTS, KEY, Provenance, of
from fomoh_fx.passes.retrace import node_of, recorded_nodes

FACTORS = ("_left", "_right")  #: what the names of a tangent's factors end in
_NAME = "name"


def label(n: fx.Node, before: fx.Node | None, result: Any) -> None:
    """Label what the trace has recorded since ``before`` for the node ``n``, whose expansion is ``result``."""
    fresh = dict.fromkeys(recorded_nodes(before))
    source = of(n).source
    values = pytree.tree_leaves(result, is_leaf=lambda x: isinstance(x, (HyperDual, Undefined)))
    names = _names_of_outputs(n, result, len(values))

    def record(node: fx.Node, primal: str, component: str, name: str) -> list[fx.Node]:
        fresh.pop(node)
        node.meta[KEY] = Provenance(primal, component, source)
        if node.op == "call_function":
            node.meta[_NAME] = name
        return node.all_input_nodes

    for component in COMPONENTS:
        needed: list[fx.Node] = []
        for value, (primal, name) in zip(values, names, strict=True):
            for suffix, node in _nodes(value, component):
                if node in fresh:
                    needed += record(node, primal, component, f"{name}{suffix}")
        while needed:
            node = needed.pop()
            if node in fresh:
                itself = component == "primal" and node.target == n.target and isinstance(result, (tuple, list))
                needed += record(node, n.name, component, n.name if itself else _on_the_way(n, component, node))
    for node in list(fresh):
        record(node, n.name, "primal", _on_the_way(n, "primal", node))


def label_inputs(nodes: Sequence[fx.Node], values: Sequence[Any]) -> None:
    """Label the inputs of the body that is being traced: ``values`` stand for the placeholders of the original."""
    for n, value in zip(nodes, values, strict=True):
        for component in COMPONENTS:
            for suffix, node in _nodes(value, component):
                node.meta[KEY] = Provenance(n.name, component, of(n).source)
                node.meta[_NAME] = f"{n.name}{suffix}"


def label_whole(nodes: Sequence[fx.Node], stacks: Mapping[fx.Node, Any]) -> None:
    """Label the tangents of inputs that are given once for all samples, and have just been expanded."""
    for n in nodes:
        if (node := node_of(stacks[n])) is not None and node.op == "call_function":
            node.meta[KEY] = Provenance(n.name, "tangent", of(n).source)
            node.meta[_NAME] = f"{n.name}_tangent_expand"


def label_rest(module: fx.GraphModule, source: str = "") -> None:
    """What no rule has recorded (what prepares an output, a body that PyTorch copies) serves what its argument does."""
    for node in module.graph.nodes:
        if KEY not in node.meta and node.op in ("placeholder", "call_function"):
            used = [n for n in node.all_input_nodes if KEY in n.meta]
            node.meta[KEY] = of(used[0]) if used else Provenance(node.name, "primal", source)
        for body in bodies_of(node):
            label_rest(body, of(node).source)


def _nodes(value: Any, component: str) -> list[tuple[str, fx.Node]]:
    """The nodes that hold a component of a value, and what their names end in."""
    if isinstance(value, (HyperDual, Undefined)):
        value = getattr(value, component, None)
    elif component != "primal":
        return []
    suffix = "" if component == "primal" else f"_{component}"
    parts = zip(FACTORS, factors([value]), strict=True) if isinstance(value, LowRank) else [("", value)]
    return [(suffix + end, node) for end, part in parts if (node := node_of(part)) is not None]


def _names_of_outputs(n: fx.Node, result: Any, count: int) -> list[tuple[str, str]]:
    """The primal and the name of each output: of several, the node that takes it out."""
    if not isinstance(result, (tuple, list)):
        return [(n.name, n.name)] * count
    taken = {user.args[1]: user.name for user in n.users if user.target is operator.getitem}
    others = {node.name for node in n.graph.nodes}
    free = [next(name for name in _numbered(f"{n.name}_{i}") if name not in others) for i in range(count)]
    return [(taken[i], taken[i]) if i in taken else (n.name, free[i]) for i in range(count)]


def _numbered(name: str) -> Iterator[str]:
    """The name, and that name with something after it."""
    return (name + "_" * more for more in itertools.count())


def _on_the_way(n: fx.Node, component: str, node: fx.Node) -> str:
    """The name of what is computed on the way to a component: it ends in the operator."""
    return f"{n.name}_{component}_{re.sub(r'_[0-9]+$', '', node.name).strip('_')}"


def renamed(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph and bodies under the recorded names, some of which were taken while the trace was under way."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        node.name = node.meta.pop(_NAME, node.name)
        node.target = node.name if node.op == "placeholder" else node.target
        copies[node] = graph.node_copy(node, copies.__getitem__)
    result = _make_graph_module(module, graph)
    for name, body in list(result.named_children()):
        if isinstance(body, fx.GraphModule):
            setattr(result, name, renamed(body))
    return result
