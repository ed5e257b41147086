"""Failures: of what a graph raises while it runs (a label out of range), which of the user's lines it comes from."""

from __future__ import annotations

import linecache
import traceback

from torch import fx

from fomoh_fx.passes import provenance

_NOTE = "fomoh_fx: raised by what the model does at"


def explain(error: BaseException) -> None:
    """Add a note to the error: the user's line, operator and component of the node that raised it.

    Nothing is added where no graph runs operator by operator, and where a note is there.
    """
    node = _raising(error)
    if node is None or any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ())):
        return
    origin = provenance.of(node)
    where = origin.source or "no line of its own (a function of PyTorch's that was given as the model or the loss)"
    error.add_note(f"{_NOTE} {where}\n  ({node.target}, {origin})")


def _raising(error: BaseException) -> fx.Node | None:
    """The innermost node that was under way."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, fx.GraphModule) and frame.f_code.co_name == "forward":
            statement = linecache.getline(frame.f_code.co_filename, line, frame.f_globals)
            name = statement.partition(" = ")[0].partition(":")[0].strip()
            found = next((node for node in module.graph.nodes if node.name == name), found)
    return found
