"""Factors: a sum with a factor of its own (``alpha``) becomes a sum with a product.

Inductor takes a sum with a matrix product as one operator, and leaves the factor out (``tests/test_upstream.py``).

Contract: a functional graph in, the same values out; what has a factor is multiplied in the dtype of the sum, as in
PyTorch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from fomoh_fx.passes.dataflow import graphs_in
from fomoh_fx.passes.insertion import insert_before

aten = torch.ops.aten


def apart(module: fx.GraphModule) -> fx.GraphModule:
    """Multiply by the factors of all sums beforehand."""
    for part in graphs_in(module):
        for node in part.graph.find_nodes(op="call_function", target=aten.add.Tensor):
            if node.kwargs.get("alpha", 1) != 1:
                _multiply(node)
        part.recompile()
    return module


def _multiply(node: fx.Node) -> None:
    x, y = cast("tuple[Any, Any]", node.args)
    factor: Any = node.kwargs["alpha"]
    dtype = node.meta["val"].dtype
    if isinstance(y, fx.Node):
        value = y.meta["val"]
        if isinstance(value, Tensor) and value.dtype != dtype:
            y = insert_before(node, f"{node.name}_to_copy", aten._to_copy.default, y, dtype=dtype)
        y = insert_before(node, f"{node.name}_mul", aten.mul.Tensor, y, factor)
    elif isinstance(factor, fx.Node):  # a number that follows from sizes, of a number: no matrix product
        return
    else:
        y = y * factor
    node.args, node.kwargs = (x, y), {}
