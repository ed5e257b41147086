"""A graph has no memory: what the model changes in place must not be part of another tensor that it reads or changes.

Every call looks anew, for the next one may have other arguments. Under ``torch.compile`` only the calls that Dynamo
traces are looked at: it traces anew where one tensor is passed twice, and not where two are views of one memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fomoh_fx.capture.program import Program
from fomoh_fx.capture.threads import is_compiling
from fomoh_fx.errors import CaptureError
from fomoh_fx.operators import library
from fomoh_fx.passes.provenance import source_of

_WHY = "a graph would read what was there before"


def refuse_overlaps(program: Program, inputs: Sequence[Tensor]) -> None:
    """Every tensor that changes has its memory to itself, as far as the graph reads or changes it; Dynamo reads this.

    Raises:
        CaptureError: it shares memory with another one, named with it; ranges of addresses that interleave, such as two
            columns of one matrix, count as shared.
    """
    if not program.changed:
        return
    used = [inputs[i] for i in program.used]
    is_changed = [i in program.changed for i in program.used]
    if is_compiling():
        torch.ops.fomoh_fx.refuse_overlaps.default(used, is_changed)
    elif (found := _overlap(used, is_changed)) is not None:
        changed, other = (program.used[i] for i in found)
        where = source_of(program.results[program.changed[changed]])
        raise CaptureError(
            f"model: {program.inputs[changed].name} is changed in place and shares memory with "
            f"{program.inputs[other].name}, which the model uses: {_WHY}; make one of them a copy (.clone()), or keep "
            f"only one and take the view of it inside the model" + (f"\n  at {where}" if where else "")
        )


def _overlap(tensors: Sequence[Tensor], is_changed: Sequence[bool]) -> tuple[int, int] | None:
    """One that is changed and another one, by number, where the ranges of bytes that they span have some in common."""
    furthest = {True: _NOWHERE, False: _NOWHERE}  # memory, end and number, of those that are changed and of the others
    for memory, start, end, i in sorted(filter(None, map(_span, range(len(tensors)), tensors))):
        for kind in (True, False) if is_changed[i] else (True,):
            if (memory, start) < furthest[kind][:2]:
                return (i, furthest[kind][2]) if is_changed[i] else (furthest[kind][2], i)
        furthest[is_changed[i]] = max(furthest[is_changed[i]], (memory, end, i))
    return None


_NOWHERE = (-1, 0, -1)


def _span(i: int, x: Tensor) -> tuple[int, Any, Any, int] | None:
    """The memory that its bytes are counted in, from the first byte to behind the last one, and its number."""
    if x.layout != torch.strided or not x.numel():  # sparse ones are refused elsewhere
        return None
    length = x.numel() if x.is_contiguous() else 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    size = x.element_size()
    if x.device.type in ("cpu", "cuda") and not isinstance(x, FakeTensor):
        start = x.data_ptr()  # storages apart may have one memory, as those made by NumPy
        return 0, start, start + length * size, i
    offset = x.storage_offset()
    return x.untyped_storage()._cdata, offset * size, (offset + length) * size, i


def _refuse(tensors: Sequence[Tensor], is_changed: Sequence[bool]) -> None:
    """As an operator: while Dynamo traces, its tensors share memory as the call's own do."""
    if _overlap(tensors, is_changed) is not None:
        raise CaptureError(
            f"model: of two arguments, parameters or buffers that share memory one is changed in place, and the model "
            f"uses the other: {_WHY}; make one of them a copy (.clone())"
        )


library.define("refuse_overlaps(Tensor[] tensors, bool[] is_changed) -> ()")
library.impl("refuse_overlaps", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake("fomoh_fx::refuse_overlaps", _refuse, lib=library)
