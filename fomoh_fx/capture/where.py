"""Where in a user's code something is that no frontend was at when it was noticed."""

from __future__ import annotations

import dis
import inspect
import linecache
import sys
from collections.abc import Callable
from contextlib import suppress
from types import CodeType, FrameType
from typing import Any

from fomoh_fx.passes.provenance import is_hidden, written_line

_SETS = ("STORE_ATTR", "DELETE_ATTR")
_READS = ("LOAD_ATTR", "LOAD_METHOD")


def at_attribute(kind: type, name: str) -> str:
    """``at model.py:12, self.calls += 1`` on a line of its own: the first that sets an attribute.

    Best in a body that reads it as well; where none sets it, one that reads it. Constructors are left out.
    """
    bodies = [
        body.__code__
        for part in kind.__mro__
        for method, value in vars(part).items()
        if method != "__init__" and inspect.isfunction(body := inspect.unwrap(getattr(value, "__func__", value)))
    ]
    users = [code for code in bodies if not is_hidden(code.co_filename)]
    set_at = [(code, line) for code in users if (line := _line(code, _SETS, name)) is not None]
    read_at = [(code, line) for code in users if (line := _line(code, _READS, name)) is not None]
    reading = [code for code, _ in read_at]
    for code, line in (*((code, line) for code, line in set_at if code in reading), *set_at, *read_at):
        return _at(code.co_filename, line)
    return ""


def at_change_of(state: Callable[[], Any], run: Callable[[], Any]) -> str:
    """The same of the user's line after which ``state`` first gives something else, while ``run`` runs."""
    before, last = state(), ("", 0)
    found: list[str] = []

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return None if found or is_hidden(frame.f_code.co_filename) else notice

    def notice(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal last
        if not found and last[0] and state() != before:
            found.append(_at(*last))
        last = frame.f_code.co_filename, frame.f_lineno
        return notice

    outer = sys.gettrace()
    sys.settrace(enter)
    try:
        with suppress(Exception):  # with other numbers it may fail, and what is to be told is where they come from
            run()
    finally:
        sys.settrace(outer)
    return found[0] if found else ""


def _at(file: str, line: int) -> str:
    return f"\n  at {written_line(file, line, linecache.getline(file, line).strip())}"


def _line(code: CodeType, operations: tuple[str, ...], name: str) -> int | None:
    """The first line of a body that does one of these to an attribute of this name."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in operations and instruction.argval == name and instruction.positions is not None:
            return instruction.positions.lineno
    return None
