"""Numbers among a model's attributes that are others after every call: ``self.step += 1``.

A graph has an attribute as a constant. That is right where nothing depends on it, or where it stays after the first
call, as the largest length that a cache was made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import nn

from fomoh_fx.capture.draws import same_graph
from fomoh_fx.capture.program import Program
from fomoh_fx.errors import CaptureError

_NUMBERS = (int, float)


@dataclass
class _Change:
    module: nn.Module
    attribute: str
    before: Any
    after: Any


def refuse_counted(capture: Callable[[], Program]) -> Program:
    """What is captured, if it does not depend on such numbers.

    Raises:
        CaptureError: the second call would have another graph, and the third one too.
    """
    with _changes() as first:
        program = capture()
    if not first:
        return program
    try:
        with _changes() as second:
            for change in first.values():
                vars(change.module)[change.attribute] = change.after
            again = capture()
    finally:
        _undo(first.values())
    counted = [change for key, change in first.items() if key in second]
    if counted and not same_graph(program, again):
        names = " and ".join(f"{type(c.module).__name__}.{c.attribute}" for c in counted)
        raise CaptureError(
            f"model: changes the number {names} at every call, and computes with it, so the graph would have its first "
            "value for ever. Keep it as a tensor in a buffer, or pass it as an argument"
        )
    return program


@contextmanager
def _changes() -> Iterator[dict[tuple[int, str], _Change]]:
    """Note which numbers modules change to others; in the end each is what it was."""
    found: dict[tuple[int, str], _Change] = {}
    assign = nn.Module.__setattr__

    def note(self: nn.Module, name: str, value: Any) -> None:
        before = vars(self).get(name)
        assign(self, name, value)
        if type(value) in _NUMBERS and type(before) in _NUMBERS and value != before:
            key = (id(vars(self)), name)  # a tracer wraps modules in others that share their attributes
            found[key] = _Change(self, name, found[key].before if key in found else before, value)

    try:
        with patch.object(nn.Module, "__setattr__", note):
            yield found
    finally:
        _undo(found.values())


def _undo(changes: Iterable[_Change]) -> None:
    for change in changes:
        vars(change.module)[change.attribute] = change.before
