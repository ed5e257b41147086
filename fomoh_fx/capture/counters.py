"""Numbers among a model's attributes, and in containers there, that are others after every call: ``self.step += 1``.

A graph has an attribute as a constant. That is right where nothing depends on it, or where it stays after the first
call, as the largest length that a cache was made for. Whether something depends on it is found by capturing again with
other numbers; that the model does something at one call alone, ``if self.step == 100``, is not found.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from torch import nn

from fomoh_fx.capture.assignments import ChangedNumbers
from fomoh_fx.capture.draws import same_graph
from fomoh_fx.capture.program import Program
from fomoh_fx.capture.threads import is_in
from fomoh_fx.errors import CaptureError

_NUMBERS = (int, float)
#: Numbers at which a count is looked at again: a model may depend on it only from some call on, or at every n-th.
_LATE, _ROUND = 10**6 + 3, 2**10 * 3**3 * 5**6 * 7 * 11 * 13


def refuse_counted(capture: Callable[[], Program]) -> Program:
    """What is captured, if it does not depend on such numbers.

    Raises:
        CaptureError: the second call would have another graph, and the third one too.
    """
    program, first = _observed(capture)
    if not first:
        return program
    try:
        for change in first.values():
            change.put(change.after)
        again, second = _observed(capture)
        counted = [change for key, change in first.items() if key in second]
        depends = bool(counted) and not same_graph(program, again)
        for later in zip(*map(_later, counted), strict=True):
            if not depends:
                for change, number in zip(counted, later, strict=True):
                    change.put(number)
                depends = not same_graph(program, _observed(capture)[0])
    finally:
        _undo(first.values())
    if depends:
        names = " and ".join(change.name for change in counted)
        raise CaptureError(
            f"model: changes the number {names} at every call, and computes with it, so the graph would have its first "
            "value for ever. Keep it as a tensor in a buffer, or pass it as an argument"
        )
    return program


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
