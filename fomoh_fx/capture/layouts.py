"""Where the inputs lie in memory, for a model that goes by it: by as_strided, or by asking for an offset."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fomoh_fx.capture.program import Program
from fomoh_fx.passes.dataflow import graphs_in
from fomoh_fx.rules.linear import BY_STRIDES


def note_layouts(program: Program, tensors: Sequence[Tensor], asks_for_offset: bool) -> None:
    """Keep the strides of the inputs, and their offsets where these matter: the graph holds for no others."""
    nodes = [node for part in graphs_in(program.module) for node in part.graph.nodes if node.target in BY_STRIDES]
    program.goes_by_offset = asks_for_offset or any(n.args[BY_STRIDES[n.target] :] not in ((), (None,)) for n in nodes)
    if nodes or program.goes_by_offset:
        program.layouts = _layouts(program, tensors)


def has_its_layouts(program: Program, tensors: Sequence[Tensor]) -> bool:
    """Whether the inputs lie in memory as they did at capture, as far as the graph goes by it."""
    return not program.layouts or program.layouts == _layouts(program, tensors)


def _layouts(program: Program, tensors: Sequence[Tensor]) -> list[tuple[tuple[int, ...], int]]:
    values = [what.value(tensors) for what in program.inputs]
    return [(x.stride(), int(x.storage_offset()) if program.goes_by_offset else 0) for x in values]
