"""Where a node comes from: the primal node it serves, the component it computes, the user's source line.

Recorded by the framework while a rule runs, never by the rule itself, and carried in ``node.meta`` by every pass.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import fx

KEY = "provenance"
COMPONENTS = ("primal", "tangent", "cross")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n\s*(?P<code>.*)')
_HIDDEN = (str(Path(torch.__file__).parent), str(Path(__file__).resolve().parent.parent / "fomoh_fx"), "<eval_with_key>")


@dataclass(frozen=True)
class Provenance:
    """The primal node's name, ``"primal"``, ``"tangent"`` or ``"cross"``, and ``file:line, code`` (may be empty)."""

    primal: str
    component: str
    source: str = ""

    def __str__(self) -> str:
        what = self.component if self.component == "primal" else f"{self.component} of {self.primal}"
        return f"{what} | {self.source}" if self.source else what


def source_line(stack_trace: str | None) -> str:
    """The innermost line of the user's own code in a stack trace: ``model.py:12, y = self.layer(x)``."""
    frames = [m for m in _FRAME.finditer(stack_trace or "")]
    users = [m for m in frames if not m["file"].startswith(_HIDDEN)]
    if not users:
        return ""
    frame = users[-1]
    return f"{Path(frame['file']).name}:{frame['line']}, {frame['code'].strip()}"


def of(node: fx.Node) -> Provenance:
    """The recorded provenance, or the node itself as a primal."""
    return node.meta.get(KEY) or Provenance(node.name, "primal", source_line(node.meta.get("stack_trace")))


def relabel(node: fx.Node, component: str, primal: str) -> None:
    """Mark a node as computing a component of the primal node, keeping its source line."""
    node.meta[KEY] = replace(of(node), component=component, primal=primal)
