"""Layouts: a captured graph with sparse values is refused, where it says which line of the model made them.

Contract: reads the graph, changes nothing, raises :class:`UnsupportedOpError` naming the node and the line.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.passes import provenance


def refuse_sparse(module: fx.GraphModule) -> None:
    """Every value, an input or computed, must be strided."""
    for node in module.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and value.layout != torch.strided:
                raise UnsupportedOpError(_text(node, value.layout))


def _text(node: fx.Node, layout: torch.layout) -> str:
    what = f"input {node.name} is" if node.op == "placeholder" else f"operator {node.target} makes"
    source = provenance.source_of(node)
    where = f"\n  at {source}" if source else ""
    return (
        f"{what} a {str(layout).removeprefix('torch.')} tensor, and sparse tensors have no rules: use a dense one, or "
        f"sum over the entries by index_add or scatter_add{where}"
    )
