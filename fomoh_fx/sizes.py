"""Sizes that may be dynamic, read without a guard."""

from __future__ import annotations

from torch import SymInt


def known(size: int | SymInt) -> int | None:
    """A size, a dynamic one as it is at capture, None for one that only the data decide: no guard is made."""
    return size.node.hint if isinstance(size, SymInt) else size
