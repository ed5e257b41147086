"""Layouts: a captured graph with sparse values is refused; the expanded one asks for no other layout of a value.

A recorded view is legal for the layout that the tracer saw, which need not be the one that a kernel makes: a result of
indexing, for one, has the layout of its index. As a reshape it copies there, and is the same view everywhere else.

Contract: ``refuse_sparse`` reads the graph, changes nothing, raises :class:`UnsupportedOpError` naming the node and the
line; ``views_as_reshapes`` gives the same nodes other targets.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.passes import provenance
from fomoh_fx.passes.dataflow import graphs_in

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def refuse_sparse(module: fx.GraphModule) -> None:
    """Every value, an input or computed, must be strided."""
    for node in module.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and value.layout != torch.strided:
                raise UnsupportedOpError(_text(node, value.layout))


def views_as_reshapes(module: fx.GraphModule) -> fx.GraphModule:
    """Every view, in the bodies too, becomes a reshape."""
    for part in graphs_in(module):
        for node in part.graph.nodes:
            if node.target in _VIEWS:
                node.target = aten.reshape.default
        part.recompile()
    return module


def _text(node: fx.Node, layout: torch.layout) -> str:
    what = f"input {node.name} is" if node.op == "placeholder" else f"operator {node.target} makes"
    source = provenance.source_of(node)
    where = f"\n  at {source}" if source else ""
    return (
        f"{what} a {str(layout).removeprefix('torch.')} tensor, and sparse tensors have no rules: use a dense one, or "
        f"sum over the entries by index_add or scatter_add{where}"
    )
