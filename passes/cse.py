"""CSE: compute equal expressions once.

Contract: a functional graph in, an equivalent one out. Two nodes are equal when operator, arguments and keyword
arguments are; random operators never are, and two values that the graph returns stay two. The earlier node stays,
with its own provenance.
"""

# PyTorch's CSEPass merges x + 1 with x + 1.0, whose dtypes differ for an integer x, and its fx_graph_cse keeps every
# read of a constant, so that nothing that takes the same index vector twice is ever merged; both know the random
# operators by a list of names, where operators carry a tag.

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fomoh_fx.passes.dataflow import draws, escapes, graphs_in, is_view, root_of


def merge_common_subexpressions(module: fx.GraphModule) -> fx.GraphModule:
    """Replace every repeated computation by its first occurrence."""
    for part in graphs_in(module):
        _merge(part)
    return module


def _merge(module: fx.GraphModule) -> None:
    seen: dict[Any, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op not in ("call_function", "get_attr") or _is_unrepeatable(node):
            continue
        key = _key(node)
        if key in seen and (is_view(node) or not (escapes(node) and escapes(root_of(seen[key])))):
            node.replace_all_uses_with(seen[key])
            module.graph.erase_node(node)
        else:
            seen[key] = node
    module.recompile()


def _is_unrepeatable(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return draws(node.target) or node.target._schema.is_mutable
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def _key(node: fx.Node) -> Any:
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    # 1, 1.0 and True are equal in Python, not in a graph; -0.0 and 0.0 neither
    typed = tuple((type(leaf), repr(leaf) if isinstance(leaf, float) else leaf) for leaf in leaves)
    return node.op, node.target, typed, spec
