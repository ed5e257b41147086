"""Capture a model: again with what it refers to as inputs, and with known values as constants, until a graph holds."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fomoh_fx.capture.call import Call
from fomoh_fx.capture.constants import argument, candidates, fewer, is_flag
from fomoh_fx.capture.counters import refuse_counted
from fomoh_fx.capture.draws import refuse_drawn
from fomoh_fx.capture.frontends import DecidedByData, first_that_works
from fomoh_fx.capture.leaks import refuse_kept
from fomoh_fx.capture.program import Program
from fomoh_fx.capture.refusals import refuse_fake, refuse_without_data
from fomoh_fx.capture.root import Root
from fomoh_fx.capture.threads import CAPTURING
from fomoh_fx.errors import CaptureError, FomohError
from fomoh_fx.passes.data_sizes import has_sizes_from_data
from fomoh_fx.rules.other_libraries import register_present


def capture(
    model: Any,
    loss: Any,
    call: Call,
    argument_names: Sequence[str],
    dynamic_shapes: Any = None,
    refusal: FomohError | None = None,
) -> Program:
    """The graph of ``model`` (and ``loss``) for one call.

    Args:
        model: a module or a function.
        loss: a module or function of (output, *targets) that returns a scalar tensor, or None.
        call: the arguments.
        argument_names: a readable name for each tensor leaf of the call.
        dynamic_shapes: for each tensor leaf what ``torch.export`` takes, or None for static shapes.
        refusal: of the graph without known values as constants, because of a size from data in it.

    Raises:
        CaptureError: no frontend could record one graph that holds for every input of this signature.
    """
    register_present()
    run = partial(_capture, model, loss, call, argument_names, dynamic_shapes, refusal)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with CAPTURING, torch.random.fork_rng(devices):  # what PyTorch computes meanwhile with what it knows may draw
        return refuse_counted(partial(refuse_drawn, run, (model, loss), call.others), model, loss, call)


def _capture(
    model: Any,
    loss: Any,
    call: Call,
    argument_names: Sequence[str],
    dynamic_shapes: Any,
    refusal: FomohError | None = None,
) -> Program:
    foreign: list[Tensor] = []
    outside: list[nn.Module] = []
    made: list[weakref.ref[Tensor]] = []
    is_last = False
    for _ in range(5):
        root = Root(model, loss, call, foreign, outside)
        outcome: Program | FomohError = first_that_works(root, argument_names, dynamic_shapes)
        refused = outcome if isinstance(outcome, DecidedByData) else refusal
        if refused is not None:
            root, outcome = _with_constants(root, refused, argument_names, dynamic_shapes, refusal is None)
        tensors, modules = _unknown(root)
        made += root.observed.semantics.made if root.observed.semantics else []
        for assignment in root.observed.assigned:
            assignment.tensors.clear()
        if not tensors and not modules:
            if isinstance(outcome, FomohError):
                raise _anew(outcome)
            refuse_kept(made, outcome.structure.others)
            try:
                refuse_fake(outcome)
            except CaptureError:
                if is_last:
                    raise
                is_last = True  # without what an attempt before has left in the cache of a function
                continue
            refuse_without_data(outcome)
            return outcome
        foreign += tensors  # capture again with what a closure holds as inputs: its values may change
        outside += modules
    if isinstance(outcome, FomohError):  # whose traceback keeps what the model makes at every call
        raise _anew(outcome)
    raise CaptureError(
        "model: makes new tensors with data at every call that it then uses as constants; make them by torch.tensor, "
        "or keep them as buffers"
    )


def _anew(error: FomohError) -> FomohError:
    """The error, if it is of capture without the frames of frontends."""
    if not isinstance(error, CaptureError):
        return error
    again = CaptureError(*error.args)
    again.__cause__ = error.__cause__
    return again


def _with_constants(
    root: Root, refusal: FomohError, names: Sequence[str], dynamic_shapes: Any, may_have_sizes: bool
) -> tuple[Root, Program | FomohError]:
    """Capture again with known values as constants, but for those that the model changes.

    Whether the data may decide sizes in the graph is ``may_have_sizes``.
    """

    def is_enough(outcome: Program | CaptureError) -> bool:
        if isinstance(outcome, CaptureError):
            return False
        return may_have_sizes or not any(map(has_sizes_from_data, outcome.module.graph.nodes))

    def captured(
        constants: Mapping[str, Tensor], flags: frozenset[str] = frozenset()
    ) -> tuple[Root, Program | CaptureError]:
        again = Root(root.model, root.loss, root.call, root.foreign, list(root.outside), constants, flags)
        outcome = first_that_works(again, names, dynamic_shapes)
        if again.observed.constants is not None and (changed := again.observed.constants.changed):
            set_here = {name for name in changed - flags if is_flag(name, constants[name])}
            left = {name: value for name, value in constants.items() if name in set_here or name not in changed}
            return captured(left, (flags - changed) | set_here)
        return again, outcome

    for constants in candidates(root, root.call.tensors, dynamic_shapes is None):
        found, outcome = captured(constants)
        if isinstance(outcome, DecidedByData) and isinstance(refusal, DecidedByData):
            root, refusal = found, outcome  # what else decides, and what else it refers to
        if isinstance(outcome, CaptureError) or not is_enough(outcome):
            continue
        assert found.observed.constants is not None
        for kept in fewer(found.constants or {}, found.observed.constants.used | found.flags):
            less = captured(kept, found.flags & kept.keys())
            if is_enough(less[1]):
                found, outcome = less
                break
        for name in [name for name in found.constants or () if name.startswith(argument(""))]:
            rest = {other: value for other, value in (found.constants or {}).items() if other != name}
            without = captured(rest)
            if is_enough(without[1]):  # that one decides nothing
                found, outcome = without
        return found, outcome
    return root, refusal


def _unknown(root: Root) -> tuple[list[Tensor], list[nn.Module]]:
    """The tensors and modules that the model used in its last run without owning them, and that outlive the run."""
    if root.observed.semantics is None:
        return [], []
    if root.observed.outside:
        gc.collect()  # a module that the model makes anew at every call is gone by now
    modules = [module for ref in root.observed.outside if (module := ref()) is not None]
    tensors = root.observed.semantics.foreign.values()
    return [t for t in tensors if not any(_owns(module, t) for module in (root, *modules))], modules


def _owns(module: nn.Module, tensor: Tensor) -> bool:
    return any(tensor is t for t in (*module.parameters(), *module.buffers()))
