"""A graph has no memory: what the model changes in place must not be part of another tensor that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.capture.program import Program
from fomoh_fx.errors import CaptureError
from fomoh_fx.passes.provenance import source_of


def refuse_overlaps(program: Program, tensors: Sequence[Tensor]) -> None:
    """Every tensor that changes has its memory to itself, as far as the graph reads it.

    Raises:
        CaptureError: it shares memory with another one, named with it; ranges of addresses that interleave, such as two
            columns of one matrix, count as shared.
    """
    results: Any = program.module.graph.output_node().args[0]
    read = [what for node, what in zip(program.placeholders, program.inputs, strict=True) if node.users]
    for result, output in zip(results, program.outputs, strict=True):
        if output.kind != "change" or output.changes is None:
            continue
        changed = output.changes.value(tensors)
        for other in read:
            if other.name != output.changes.name and _overlap(changed, other.value(tensors)):
                where = source_of(result)
                raise CaptureError(
                    f"model: {output.changes.name} is changed in place and shares memory with {other.name}, which the "
                    f"model reads: a graph would read what was there before; make one of them a copy (.clone()), or "
                    f"keep only one and take the view of it inside the model" + (f"\n  at {where}" if where else "")
                )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether the ranges of bytes from the first to the last element of both have some in common."""
    if not one.layout == other.layout == torch.strided:  # sparse ones are refused elsewhere
        return False
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    (start, end), (other_start, other_end) = _bytes(one), _bytes(other)
    return start < other_end and other_start < end


def _bytes(x: Tensor) -> tuple[int, int]:
    length = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    start, size = int(x.storage_offset()), x.element_size()
    return start * size, (start + int(length)) * size
