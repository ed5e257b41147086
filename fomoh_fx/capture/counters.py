"""Numbers among a model's attributes, and in containers there, that a call changes.

A graph has an attribute as a constant. Numbers that the second call would leave as they are, such as the largest length
that a cache was made for, every call assigns, and the next one has a graph of its own. Those that every call changes
(``self.step += 1``) stay as they are, if nothing depends on them, and are refused otherwise. Which of them these are is
found by capturing again as the second call and some later ones would find the model; that the model does something at
one call alone, ``if self.step == 100``, is not found.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fomoh_fx.capture.assignments import Assignments, ChangedNumbers
from fomoh_fx.capture.draws import same_graph
from fomoh_fx.capture.program import Call, Program, Root
from fomoh_fx.capture.threads import is_in
from fomoh_fx.errors import CaptureError, FomohError
from fomoh_fx.passes.retrace import without_autocast

_NUMBERS = (int, float)
#: Numbers at which a count is looked at again: a model may depend on it only from some call on, or at every n-th.
_LATE, _ROUND = 10**6 + 3, 2**10 * 3**3 * 5**6 * 7 * 11 * 13


def refuse_counted(capture: Callable[[], Program], model: Any, loss: Any, call: Call) -> Program:
    """What is captured, if it does not depend on numbers that every call changes.

    Raises:
        CaptureError: the second call would have another graph, and the third one too.
    """
    program, first = _observed(capture)
    if not first:
        return program
    counted: list[ChangedNumbers] = []
    depends = False
    with _after_a_call(program, first.values(), Root(model, loss, call, outside=program.outside)):
        try:
            same = _observed(capture)[0] if program.assignments else program  # but for the numbers
            _put(first.values(), [change.after for change in first.values()])
            again, second = _observed(capture)
        except FomohError:  # which the second call will raise
            second = {}
        else:
            counted = [change for key, change in first.items() if key in second]
            depends = bool(counted) and not same_graph(same, again)
        for later in zip(*map(_later, counted), strict=True):
            if not depends:
                _put(counted, later)
                depends = not same_graph(same, _observed(capture)[0])
    if depends:
        names = " and ".join(change.name for change in counted)
        raise CaptureError(
            f"model: changes the number {names} at every call, and computes with it, so the graph would have its first "
            "value for ever. Keep it as a tensor in a buffer, or pass it as an argument"
        )
    program.settled = [change for key, change in first.items() if key not in second]
    for change in program.settled:
        if change.is_size:
            raise CaptureError(
                f"model: keeps the size of a dynamic dimension in {change.name}, where later calls find it. Leave that "
                "dimension static, or pass the number as an argument"
            )
    return program


@contextmanager
def _after_a_call(program: Program, changes: Iterable[ChangedNumbers], root: Root) -> Iterator[None]:
    """The model as a call of the program leaves it, but for its numbers; in the end all of it is as it was."""
    try:
        with Assignments(root):
            program.assign(_assigned_values(program, root.call.tensors), root.call.tensors)
            yield
    finally:
        _undo(changes)


def _put(changes: Iterable[ChangedNumbers], numbers: Iterable[Any]) -> None:
    for change, number in zip(changes, numbers, strict=True):
        change.put(number)


def _assigned_values(program: Program, arguments: Sequence[Tensor]) -> list[Tensor]:
    """What the model computes for its attributes."""
    if not any(what.kind == "assignment" for what in program.outputs):
        return []
    inputs = [what.value(arguments) for what in program.inputs]
    with torch.no_grad(), without_autocast(), torch.random.fork_rng():
        values = program.module(*inputs)
    return [value for value, what in zip(values, program.outputs, strict=True) if what.kind == "assignment"]


def _later(change: ChangedNumbers) -> tuple[Any, ...]:
    """What the number may be at other calls, before they change it; what is in a list stays as it is after one."""
    if type(change.before) not in _NUMBERS:
        return (change.after,) * 3
    step = change.after - change.before
    far = _ROUND if step > 0 else -_ROUND
    return change.before + _LATE * step, far - step, far


def _observed(capture: Callable[[], Program]) -> tuple[Program, dict[Any, ChangedNumbers]]:
    """What is captured, and the numbers that were changed meanwhile, which are as they were."""
    with _changes() as found:
        program = capture()
    return program, found | {change.key: change for change in program.numbers}


@contextmanager
def _changes() -> Iterator[dict[Any, ChangedNumbers]]:
    """Note which numbers modules change to others; in the end each is what it was."""
    found: dict[Any, ChangedNumbers] = {}
    assign, thread = nn.Module.__setattr__, threading.get_ident()

    def note(self: nn.Module, name: str, value: Any) -> None:
        before = vars(self).get(name)
        assign(self, name, value)
        if is_in(thread) and type(value) in _NUMBERS and type(before) in _NUMBERS and value != before:
            key = (id(vars(self)), name)  # a tracer wraps modules in others that share their attributes
            first = found[key].before if key in found else before
            put = partial(vars(self).__setitem__, name)
            found[key] = ChangedNumbers(key, f"{type(self).__name__}.{name}", put, first, value)

    try:
        with patch.object(nn.Module, "__setattr__", note):
            yield found
    finally:
        _undo(found.values())


def _undo(changes: Iterable[ChangedNumbers]) -> None:
    for change in changes:
        change.put(change.before)
