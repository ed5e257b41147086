"""Parts: every part of a split becomes a slice, and every part of an unbind a selection, an operator of its own.

Contract: a normalised graph of static sizes in, the same values out. What has one output can be transposed alone.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
SPLITS = {
    aten.split.Tensor, aten.split_with_sizes.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default,
    aten.chunk.default,
}  # fmt: skip


def take_apart(module: fx.GraphModule) -> fx.GraphModule:
    """In the graph itself."""
    for node in list(module.graph.nodes):
        if node.target not in SPLITS and node.target is not aten.unbind.int:
            continue
        users = list(node.users)
        if not all(user.target is operator.getitem for user in users):
            continue
        for user in users:
            with module.graph.inserting_before(user):
                part = module.graph.call_function(*_part(node, user.args[1]))
            part.meta = dict(user.meta)
            user.replace_all_uses_with(part)
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    return module


def _part(node: fx.Node, number: Any) -> tuple[Any, tuple[Any, ...]]:
    """The operator for a part, and its arguments."""
    source, dim = node.args[0], _axis(node)
    number %= len(node.meta["val"])
    if node.target is aten.unbind.int:
        return aten.select.int, (source, dim, number)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    return aten.slice.Tensor, (source, dim, sum(sizes[:number]), sum(sizes[: number + 1]))


def _axis(node: fx.Node) -> int:
    position = 1 if node.target is aten.unbind.int else 2
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return dim % node.args[0].meta["val"].ndim  # type: ignore[union-attr,operator,no-any-return]
