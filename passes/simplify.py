"""Simplify: algebraic identities that need no knowledge of where a node came from.

Contract: a functional graph in, an equivalent one with at most as many nodes out. Each rewrite is one function from a
node to the node that can take its place, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
Rewrite = Callable[[fx.Node], fx.Node | None]


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _same(node: fx.Node, source: Any) -> bool:
    """Whether two nodes hold tensors of one shape, dtype and device."""
    a, b = _value(node), _value(source)
    return a is not None and b is not None and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _unchanged(node: fx.Node) -> fx.Node | None:
    """An operator that only moves data, where the result has the argument's own shape, dtype and device."""
    source = node.args[0]
    return source if isinstance(source, fx.Node) and _same(node, source) else None


def _copied(node: fx.Node) -> fx.Node | None:
    """A copy of a value that nothing can mutate; a copy made for its layout stays where the layout differs."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not _same(node, source):
        return None
    a, b = _value(node), _value(source)
    return source if a is not None and b is not None and a.stride() == b.stride() else None


def _reshaped(node: fx.Node) -> fx.Node | None:
    """A view of a view is one view."""
    source = node.args[0]
    if (same := _unchanged(node)) is not None:
        return same
    if isinstance(source, fx.Node) and source.target in _VIEWS:
        node.replace_input_with(source, source.args[0])
        return _unchanged(node)
    return None


def _permuted(node: fx.Node) -> fx.Node | None:
    source, dims = node.args
    rank = len(dims)
    if [d % rank for d in dims] == list(range(rank)):
        return source
    return None


def _times_one(node: fx.Node) -> fx.Node | None:
    x, w = node.args[:2]
    if isinstance(x, fx.Node) and not isinstance(w, fx.Node) and w == 1 and _same(node, x):
        return x
    return None


def _plus_zero(node: fx.Node) -> fx.Node | None:
    x, w = node.args[:2]
    if isinstance(x, fx.Node) and not isinstance(w, fx.Node) and w == 0 and _same(node, x):
        return x
    return None


_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}

REWRITES: dict[Any, Rewrite] = {
    aten.view.default: _reshaped,
    aten.reshape.default: _reshaped,
    aten._unsafe_view.default: _reshaped,
    aten.expand.default: _unchanged,
    aten.permute.default: _permuted,
    aten.clone.default: _copied,
    aten._to_copy.default: _copied,
    aten.mul.Tensor: _times_one,
    aten.div.Tensor: _times_one,
    aten.add.Tensor: _plus_zero,
    aten.sub.Tensor: _plus_zero,
}


def simplify(module: fx.GraphModule) -> fx.GraphModule:
    """Apply the rewrites to every node, in order, once: a node's arguments are already in their final form."""
    for node in list(module.graph.nodes):
        rewrite = REWRITES.get(node.target) if node.op == "call_function" else None
        replacement = rewrite(node) if rewrite else None
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            module.graph.erase_node(node)
    module.recompile()
    return module
