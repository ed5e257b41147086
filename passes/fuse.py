"""Fuse: a + b * c is one operator, with a number among the factors too.

The product rule is made of such sums. Without a compiler each of them is one reading of memory and not two or three.

Contract: a functional graph in, an equivalent one out with fewer nodes. The node of the sum stays, with its provenance;
primal nodes stay as the user wrote them, so that values are the model's own to the last bit. The bodies of higher-order
operators stay, too: what they return has to keep its layout, which is that of the first of the terms.
"""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from fomoh_fx.passes import provenance
from fomoh_fx.passes.simplify import value_of

aten = torch.ops.aten
_SIGNS = {aten.add.Tensor: 1, aten.sub.Tensor: -1}


def fuse_products_into_sums(module: fx.GraphModule) -> fx.GraphModule:
    """Every sum with a product that nobody else uses becomes an addcmul, outside of bodies."""
    for node in list(module.graph.nodes):
        if node.target in _SIGNS and not node.kwargs and provenance.of(node).component != "primal":
            _fuse(node)
    module.recompile()
    return module


def _fuse(node: fx.Node) -> None:
    first, second = node.args
    candidates = [(first, second)] if node.target is aten.sub.Tensor else [(first, second), (second, first)]
    for term, product in candidates:
        factors, numbers, inner = _factors(product)
        if len(factors) != 2 or not _alike([node, term, *factors]):
            continue
        value = reduce(operator.mul, numbers, _SIGNS[node.target])  # type: ignore[index]
        options: dict[str, Any] = {} if value == 1 else {"value": value}
        node.target, node.args, node.kwargs = aten.addcmul.default, (term, *factors), options
        node.meta["val"] = aten.addcmul.default(*map(value_of, node.args), **options)  # it has a layout of its own
        for unused in inner:
            node.graph.erase_node(unused)
        return


def _factors(product: Any) -> tuple[list[fx.Node], list[float], list[fx.Node]]:
    """The tensors and the numbers of a product, and its nodes, each used by the next alone; [] for anything else."""
    if not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor or len(product.users) != 1:
        return [], [], []
    first, second = product.args
    if isinstance(first, fx.Node) and isinstance(second, fx.Node):
        return [first, second], [], [product]
    tensor, number = (first, second) if isinstance(first, fx.Node) else (second, first)
    factors, numbers, inner = _factors(tensor)
    if isinstance(number, (int, float)) and not isinstance(number, bool):
        return factors, [*numbers, number], [product, *inner]
    return [], [], []


def _alike(nodes: list[Any]) -> bool:
    """Whether all are floating-point tensors of one dtype on one device: then nothing is converted in between."""
    values = [value_of(node) for node in nodes]
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in values):
        return False
    return len({(value.dtype, value.device) for value in values if value is not None}) == 1
