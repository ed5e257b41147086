"""Sizes and values that only the data decide: the errors that PyTorch raises for them, and what to do about them."""

from __future__ import annotations

from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols
from torch.utils import _pytree as pytree

DECIDED_BY_DATA = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
ADVICE = (
    "the values of tensors decide a branch, a loop or a shape there: write it with torch.where, torch.cond or a mask "
    "over all cases, or let a Python number decide; compute with a tensor of one number as it is, without float(x) or "
    "x.item(), and print or log it after the call"
)


def is_decided_by_data(error: BaseException | None) -> bool:
    """Whether the error, or what caused it, is of that kind."""
    return error is not None and (isinstance(error, DECIDED_BY_DATA) or is_decided_by_data(error.__cause__))


def has_sizes_from_data(node: fx.Node) -> bool:
    """Whether a size of the node's arguments or of its value is known only from data, as that of ``x[x > 0]``."""
    values = pytree.tree_leaves([n.meta.get("val") for n in (node, *node.all_input_nodes)])
    return any(free_unbacked_symbols(v) for v in values if isinstance(v, Tensor))
