"""The frontends in the order in which they are tried: non-strict export first, make_fx on fake tensors after it.

Both tell the model that it is being exported; at last it is captured as it runs eagerly, unless data decide.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fomoh_fx.capture.assigned import note_assignments
from fomoh_fx.capture.by_export import from_export
from fomoh_fx.capture.by_make_fx import from_make_fx
from fomoh_fx.capture.dimensions import refusals
from fomoh_fx.capture.inputs import constant_of, name_inputs, share_tied, ties
from fomoh_fx.capture.known import fold_known
from fomoh_fx.capture.layouts import note_layouts
from fomoh_fx.capture.overlaps import refuse_overlaps
from fomoh_fx.capture.program import Program
from fomoh_fx.capture.reasons import Reason, each_once, without_locals
from fomoh_fx.capture.refusals import raise_what_was_caught
from fomoh_fx.capture.root import Root
from fomoh_fx.capture.tracing import containers_kept, foreign_restored, tracing_state
from fomoh_fx.errors import CaptureError, FomohError, UnsupportedOpError
from fomoh_fx.passes.data_sizes import ADVICE, DECIDED_BY_DATA
from fomoh_fx.passes.provenance import source_line

_AS_EAGERLY = "make_fx without torch.compiler.is_exporting"
FRONTENDS: dict[str, Callable[[Root, Sequence[str], Any], Program]] = {
    "torch.export": from_export,
    "make_fx": from_make_fx,
    _AS_EAGERLY: partial(from_make_fx, is_exporting=False),
}


class DecidedByData(CaptureError):
    """The values of tensors decide what the model does."""


def first_that_works(root: Root, names: Sequence[str], dynamic_shapes: Any) -> Program | CaptureError:
    """What the first frontend that captures the root makes of it, or why none does.

    Arguments with tangents require a gradient meanwhile. Where autograd refuses that, for want of a backward, which
    expanding forward does not need, they require none; then the model must not ask.
    """
    outcome = _by_some_frontend(root, names, dynamic_shapes)
    if not isinstance(outcome, CaptureError) or isinstance(outcome, DecidedByData) or not root.call.differentiated:
        return outcome
    differentiated, root.call.differentiated = root.call.differentiated, ()
    without = _by_some_frontend(root, names, dynamic_shapes)
    root.call.differentiated = differentiated
    is_told = root.observed.semantics is None or root.observed.semantics.has_denied
    return outcome if is_told or isinstance(without, CaptureError) else without


def _by_some_frontend(root: Root, names: Sequence[str], dynamic_shapes: Any) -> Program | CaptureError:
    refused: list[Reason] = []
    cause: BaseException | None = None
    decided_by_data = False
    for name, frontend in FRONTENDS.items():
        if decided_by_data and name == _AS_EAGERLY:  # where a model asks for more values
            continue
        try:
            with tracing_state(), foreign_restored(root), containers_kept(root):
                program = frontend(root, names, dynamic_shapes)
                raise_what_was_caught(root)
        except (UnsupportedOpError, CaptureError) as error:
            where = source_line("".join(traceback.format_tb(error.__traceback__)))
            raise type(error)(f"{error}\n  at {where}" if where else str(error)) from error
        except FomohError:
            raise
        except Exception as error:
            refused.append(Reason.of(name, error))
            cause = without_locals(error)
            decided_by_data |= isinstance(error, DECIDED_BY_DATA)
            if dynamic_shapes is not None:  # only torch.export captures them
                reasons = refusals(error, names) or [refused[-1].text]
                return _refused("dynamic_shapes: torch.export does not capture them:", reasons, decided_by_data, cause)
            continue
        program.refused, program.outside = [str(reason) for reason in refused], tuple(root.outside)
        program.constants = [(constant_of(root, name, names), v.clone()) for name, v in (root.constants or {}).items()]
        share_tied(program)
        fold_known(program, root.foreign)
        name_inputs(program)
        refuse_overlaps(program, [what.value(root.call.tensors) for what in program.inputs])
        assert root.observed.semantics is not None
        note_layouts(program, root.call.tensors, root.observed.semantics.asks_for_offset)
        note_assignments(program, root, names)
        program.ties = ties(program, root)
        return program
    lines = [*each_once(refused), ADVICE] if decided_by_data else each_once(refused)
    return _refused("model: no frontend could capture it as one graph", lines, decided_by_data, cause)


def _refused(what: str, lines: Sequence[str], is_by_data: bool, cause: BaseException | None) -> CaptureError:
    error = (DecidedByData if is_by_data else CaptureError)("\n  ".join([what, *lines]))
    error.__cause__ = cause
    return error
