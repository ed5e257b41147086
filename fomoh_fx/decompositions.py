"""PyTorch's core decompositions, looked up once: PyTorch goes through all of its operators anew at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from threading import get_ident
from typing import Any
from unittest.mock import patch

from torch._decomp import _core_aten_decompositions_post_autograd, core_aten_decompositions
from torch._export.utils import _is_preservable_cia_op, _special_op_to_preserve_cia
from torch.export import ExportedProgram, exported_program

Table = dict[Any, Callable[..., Any]]
#: PyTorch's function that tells composite operators from the others.
_SPLIT = "_split_decomp_table_to_cia_and_python_decomp"


@cache
def core_decompositions() -> Table:
    """By operator, to be read only. Composite operators of other libraries that come later have only their bodies."""
    return dict(core_aten_decompositions())


def decomposed(exported: ExportedProgram, whole: Iterable[Any]) -> ExportedProgram:
    """``exported`` in core operators, but for those that stay ``whole``, as ``run_decompositions`` gives it.

    For the time of such a call PyTorch overrides every composite operator that exists, nearly each with what it does
    anyway, which took most of the time of a small model's capture. Here only the others are overridden.
    """
    kept = set(whole)
    composite, others = _overrides()
    composite = composite | {op: _special_op_to_preserve_cia for op in kept if _is_preservable_cia_op(op)}
    others = {op: body for op, body in others.items() if op not in kept}
    here, pytorchs = get_ident(), getattr(exported_program, _SPLIT)
    with patch.object(
        exported_program, _SPLIT, lambda table: (composite, table) if get_ident() == here else pytorchs(table)
    ):
        return exported.run_decompositions(others)


@cache
def _overrides() -> tuple[Table, Table]:
    """Of the composite operators those that do not become their own bodies, and all of the others."""
    composite, others = getattr(exported_program, _SPLIT)(dict(core_decompositions()))
    replaced = _core_aten_decompositions_post_autograd()
    return {op: f for op, f in composite.items() if f is _special_op_to_preserve_cia or op in replaced}, others
