"""Dynamic dimensions under torch.export: what it says about them, and the marks that it leaves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


def refusals(error: Exception, names: Sequence[str]) -> list[str]:
    """What ``torch.export`` says about the dimensions of its inputs, in the names of the arguments."""

    def named(match: re.Match[str]) -> str:
        return f"dimension {match[2]} of {names[int(match[1])]}"

    lines = [line.strip() for line in str(error).splitlines()]
    told = [line[1:].strip().split(" If you're using")[0] for line in lines if line.startswith("-")]
    where = r"(?:dimension )?(?:L|inputs)\['tensors'\]\[(\d+)\]\.(?:size\(\)|shape)\[(\d+)\]"
    return list(dict.fromkeys(re.sub(where, named, line) for line in told))


@contextmanager
def marks_kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Export marks dynamic dimensions on the caller's own tensors, and removes the caller's own marks."""
    before = [dict(vars(t)) for t in tensors]
    try:
        yield
    finally:
        for tensor, attributes in zip(tensors, before, strict=True):
            vars(tensor).clear()
            vars(tensor).update(attributes)
