"""Branches on whether two tensors are equal: ``if torch.equal(x1, x2): ..``.

Two values that are computed alike are. The branch for equal ones is captured, and the graph asserts that they are.
"""

from __future__ import annotations

import traceback

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fomoh_fx.passes.dataflow import draws
from fomoh_fx.passes.provenance import source_line
from fomoh_fx.passes.retrace import node_of


def equal(input: Tensor, other: Tensor) -> bool:
    """``torch.equal``, without a look at the values where shapes differ, or where both are computed alike."""
    if input.shape != other.shape:
        return False
    if input is other:
        return True
    if not _are_alike(node_of(input), node_of(other)):
        return torch.equal(input, other)
    where = source_line("".join(traceback.format_stack()))
    message = f"values are not equal (some are no numbers), but the branch for equal ones was captured (at {where})"
    torch._assert_async((input == other).all(), message)
    return True


def _are_alike(one: fx.Node | None, other: fx.Node | None) -> bool:
    """Whether two nodes are one expression of the same values, none of them drawn; changes in place count as others."""
    pending, met = [(one, other)], set()
    while pending:
        pair = a, b = pending.pop()
        if a is b and a is not None or pair in met:
            continue
        met.add(pair)
        if a is None or b is None or a.op != "call_function" or a.target != b.target or a.op != b.op:
            return False
        if not isinstance(a.target, torch._ops.OpOverload) or draws(a.target) or a.target._schema.is_mutable:
            return False
        (ours, form), (theirs, their_form) = (pytree.tree_flatten((n.args, n.kwargs)) for n in (a, b))
        if form != their_form:
            return False
        for mine, its in zip(ours, theirs, strict=True):
            if isinstance(mine, fx.Node) and isinstance(its, fx.Node):
                pending.append((mine, its))
            elif type(mine) is not type(its) or repr(mine) != repr(its):
                return False
    return True
