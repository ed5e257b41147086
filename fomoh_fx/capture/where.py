"""Where in a user's code something is that no frontend was at when it was noticed: found in the code of a class."""

from __future__ import annotations

import dis
import inspect
import linecache
from types import CodeType

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
        text = linecache.getline(code.co_filename, line).strip()
        return f"\n  at {written_line(code.co_filename, line, text)}"
    return ""


def _line(code: CodeType, operations: tuple[str, ...], name: str) -> int | None:
    """The first line of a body that does one of these to an attribute of this name."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in operations and instruction.argval == name and instruction.positions is not None:
            return instruction.positions.lineno
    return None
