"""Sizes that may be dynamic, read without a guard, and what they are in a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import SymBool, SymFloat, SymInt, Tensor
from torch.utils import _pytree as pytree

#: The kinds of numbers that stand for a size, or for what follows from sizes.
SYMBOLIC = (SymInt, SymFloat, SymBool)


def known(size: int | SymInt) -> int | None:
    """A size, a dynamic one as it is at capture, None for one that only the data decide: no guard is made."""
    return size.node.hint if isinstance(size, SymInt) else size


def evaluated(value: Any, examples: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
    """The value with the numbers that its sizes have in a call.

    Args:
        value: a pytree with symbolic numbers.
        examples: the (fake) tensors that were traced, in whose sizes these are.
        tensors: those of the call, in the same order.
    """
    sizes: list[Any] = [n for x in examples if isinstance(x, Tensor) for n in x.shape if isinstance(n, SymInt)]
    environment = sizes[0].node.shape_env if sizes else None
    if environment is None:
        return value
    bound = environment.bind_symbols(examples, tensors)

    def number(symbolic: Any) -> Any:
        return symbolic.node.pytype(environment.replace(symbolic.node.expr).xreplace(bound))

    return pytree.tree_map_only(SYMBOLIC, number, value)
