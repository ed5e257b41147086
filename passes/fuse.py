"""Fuse: a sum with a product that nothing else uses is one operator.

Contract: a functional graph in, the same values out of fewer nodes: x + a * b is addcmul(x, a, b). Only of real
numbers, and where the result keeps its layout.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from fomoh_fx.passes.data_sizes import has_sizes_from_data
from fomoh_fx.passes.dataflow import graphs_in
from fomoh_fx.passes.simplify import value_of
from fomoh_fx.sizes import known

aten = torch.ops.aten
_SIGNS: dict[Any, int] = {aten.add.Tensor: 1, aten.sub.Tensor: -1}
_PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar}


class _Fused(NamedTuple):
    """A call of addcmul that takes the place of a sum and of a product in it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    product: fx.Node


def fuse(module: fx.GraphModule) -> fx.GraphModule:
    """Replace sums with products by single operators."""
    for part in graphs_in(module):
        for node in list(part.graph.nodes):
            if node.target in _SIGNS and not node.kwargs and not has_sizes_from_data(node):
                _fuse(node)
        part.recompile()
    return module


def _fuse(node: fx.Node) -> None:
    x, y = node.args
    orders = ((x, y), (y, x)) if node.target is aten.add.Tensor else ((x, y),)
    for kept, product in orders:
        found = _fused(node, kept, product)
        if found is not None and _is_alike(found, node):
            node.target, node.args, node.kwargs = aten.addcmul.default, found.args, found.kwargs
            node.graph.erase_node(found.product)
            return


def _fused(node: fx.Node, kept: Any, product: Any) -> _Fused | None:
    """The call for ``kept`` plus or minus ``product``."""
    if not isinstance(kept, fx.Node) or kept is product or not _is_product(product):
        return None
    a, b = product.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    sign = _SIGNS[node.target]
    return _Fused((kept, a, b), {} if sign == 1 else {"value": sign}, product)


def _is_product(node: Any) -> bool:
    """Whether it is one that has a single use."""
    return isinstance(node, fx.Node) and node.target in _PRODUCTS and len(node.users) == 1 and not node.kwargs


def _is_alike(found: _Fused, node: fx.Node) -> bool:
    """Whether the call has the recorded result in the recorded layout, from operands of its own dtype and device."""
    values = [value for n in (node, *found.args) if (value := value_of(n)) is not None]
    if len(values) <= len(found.args) or not all(_is_plain(value) for value in values):
        return False
    if len({(value.dtype, value.device) for value in values}) > 1:
        return False
    expected, *operands = map(_outline, values)
    actual = aten.addcmul.default(*operands, **found.kwargs)
    return (actual.shape, actual.stride()) == (expected.shape, expected.stride())


def _is_plain(value: Tensor) -> bool:
    """Whether it is an array of real numbers, as they are in memory; addcmul's own factor spoils complex infinities."""
    return value.is_floating_point() and not value.is_neg()


def _outline(value: Tensor) -> Tensor:
    """Without data or symbols: a dynamic size is as at the first call, and so gets no guard."""
    size, stride = ([cast(int, known(n)) for n in numbers] for numbers in (value.shape, value.stride()))
    return torch.empty_strided(size, stride, dtype=value.dtype, device="meta")
