"""Layouts: a captured graph with sparse values is refused; the expanded one asks for no other layout of a value.

A recorded view is legal for the layout that the tracer saw, which need not be the one that a kernel makes: a result of
indexing, for one, has the layout of its index. As a reshape it copies there, and is the same view everywhere else.
Operators with bodies take no two operands that share memory, which earlier passes do not see to: a copy goes between.

Contract: ``refuse_sparse`` reads the graph, changes nothing, raises :class:`UnsupportedOpError` naming the node and the
line; ``settle`` gives views other targets and adds copies of operands.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.passes import provenance
from fomoh_fx.passes.dataflow import graphs_in, owner_of

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def refuse_sparse(module: fx.GraphModule) -> None:
    """Every value, an input or computed, must be strided."""
    for node in module.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and value.layout != torch.strided:
                raise UnsupportedOpError(_text(node, value.layout))


def settle(module: fx.GraphModule) -> fx.GraphModule:
    """Every view, in the bodies too, becomes a reshape, and operands are apart."""
    for part in graphs_in(module):
        for node in list(part.graph.nodes):
            if node.target in _VIEWS:
                node.target = aten.reshape.default
            elif isinstance(node.target, HigherOrderOperator):
                _part_operands(node)
        part.recompile()
    return module


def _part_operands(node: fx.Node) -> None:
    """A copy of every operand that shares memory with one before it."""
    owners: set[fx.Node] = set()

    def apart(operand: fx.Node) -> fx.Node:
        if not isinstance(operand.meta.get("val"), Tensor):
            return operand
        owner = owner_of(operand)
        if owner not in owners:
            owners.add(owner)
            return operand
        with node.graph.inserting_before(node):
            copy = node.graph.call_function(aten.clone.default, (operand,))
        copy.meta = dict(operand.meta)
        return copy

    node.args = fx.map_arg(node.args, apart)


def _text(node: fx.Node, layout: torch.layout) -> str:
    what = f"input {node.name} is" if node.op == "placeholder" else f"operator {node.target} makes"
    source = provenance.source_of(node)
    where = f"\n  at {source}" if source else ""
    return (
        f"{what} a {str(layout).removeprefix('torch.')} tensor, and sparse tensors have no rules: use a dense one, or "
        f"sum over the entries by index_add or scatter_add{where}"
    )
