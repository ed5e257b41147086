"""Where a node comes from: the primal node it serves, the component it computes, the user's source line.

Recorded by the framework while a model is captured and while a rule runs, never by the rule itself, and carried in
``node.meta`` by every pass.
"""

from __future__ import annotations

import linecache
import re
import sys
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from fomoh_fx import errors

KEY = "provenance"
COMPONENTS = ("primal", "tangent", "cross")
_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)(?:\n(?!\s*File ")[ \t]*(?P<code>.*))?'
)
_HIDDEN = tuple(
    str(Path(file).resolve().parent) + "/" for file in (torch.__file__, errors.__file__, __file__) if file is not None
)
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + "/"
_ROOT = "capture/root.py"  # the frame that calls the model: what is outside it is the caller's, not the model's


@dataclass(frozen=True)
class Provenance:
    """The primal node's name, ``"primal"``, ``"tangent"`` or ``"cross"``, and ``file:line, code`` (may be empty)."""

    primal: str
    component: str
    source: str = ""

    def __str__(self) -> str:
        return self.component if self.component == "primal" else f"{self.component} of {self.primal}"


def of(node: fx.Node) -> Provenance:
    """The recorded provenance, or the node itself as a primal."""
    return node.meta.get(KEY) or Provenance(node.name, "primal", source_of(node))


def source_of(node: fx.Node) -> str:
    """The user's line that a captured node comes from, or else the path of the module that made it."""
    return source_line(node.meta.get("stack_trace")) or _module_path(node.meta.get("nn_module_stack"))


def source_line(stack_trace: str | None) -> str:
    """The innermost line of the user's own code in a stack trace: ``model.py:12, y = self.layer(x)``."""
    frames = list(_FRAME.finditer(stack_trace or ""))
    roots = [i for i, frame in enumerate(frames) if _is_root(frame["file"])]
    users = [frame for frame in frames[roots[0] + 1 if roots else 0 :] if not is_hidden(frame["file"])]
    if not users:
        return ""
    frame = users[-1]
    return written_line(frame["file"], int(frame["line"]), (frame["code"] or "").strip())


def written_line(file: str, line: int, code: str) -> str:
    """``model.py:12, y = self.layer(x)``; without the code where there is none."""
    return f"{_short(file)}:{line}, {code}".removesuffix(", ")


def _short(file: str) -> str:
    """A file's name; what a notebook runs has the name of a temporary file, which tells nobody anything."""
    return "notebook" if "ipykernel_" in file or file.startswith("<ipython-input") else Path(file).name


@lru_cache(maxsize=4096)
def is_hidden(file: str) -> bool:
    """Whether the code is PyTorch's, this compiler's, Python's, or generated."""
    if file.startswith(("<eval_with_key>", "<frozen")):
        return True
    path = str(Path(file).resolve())
    in_library = path.startswith(_STANDARD_LIBRARY) and "site-packages" not in path and "dist-packages" not in path
    return in_library or path.startswith(_HIDDEN)


@lru_cache(maxsize=4096)
def _is_root(file: str) -> bool:
    return file.endswith(_ROOT) and is_hidden(file)


def _module_path(stack: dict[str, tuple[str, Any]] | None) -> str:
    """``seq.0 (Linear)`` for the innermost module, ``MLP`` for the model itself."""
    path, kind = list(stack.values())[-1][:2] if stack else ("", "")
    name = str(kind).rpartition(".")[-1]
    if path in ("", "model"):
        return name if path else ""
    return f"{path.removeprefix('model.')} ({name})"


class RecordSourceLines(TorchFunctionMode):
    """Records, while a model runs under a frontend, the user's innermost line for every torch function it calls.

    The tracers keep only frames of functions called ``forward``: a model's other methods, and functions, have none.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        frame = _user_frame(sys._getframe(1))
        if frame is None or not fx.traceback.has_preserved_node_meta():
            return func(*args, **(kwargs or {}))
        before = fx.traceback.format_stack()
        fx.traceback.set_stack_trace([_described(frame)])
        try:
            return func(*args, **(kwargs or {}))
        finally:
            fx.traceback.set_stack_trace(before if any(before) else [])


def _user_frame(frame: FrameType | None) -> FrameType | None:
    while frame is not None and not _is_root(frame.f_code.co_filename):
        if not is_hidden(frame.f_code.co_filename):
            return frame
        frame = frame.f_back
    return None


def _described(frame: FrameType) -> str:
    """The frame as a traceback prints it."""
    file, line = frame.f_code.co_filename, frame.f_lineno
    code = linecache.getline(file, line, frame.f_globals).strip()
    return f'File "{file}", line {line}, in {frame.f_code.co_name}\n    {code}\n'
