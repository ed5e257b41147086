"""One thread captures at a time; what others run meanwhile is theirs."""

from __future__ import annotations

import threading

import torch

#: Held by the thread that captures or expands: frontends, and what is patched meanwhile, are the process's.
CAPTURING = threading.RLock()


def is_in(thread: int) -> bool:
    """Whether this runs in the thread; Dynamo cannot read its number, and traces in the one that captures."""
    return torch.compiler.is_dynamo_compiling() or threading.get_ident() == thread


def is_capturing() -> bool:
    """Whether this runs inside a model that this thread captures."""
    return not torch.compiler.is_dynamo_compiling() and CAPTURING._is_owned()  # type: ignore[attr-defined]


def is_compiling() -> bool:
    """Whether this thread is under Dynamo or an export: one of another thread sets the same flag, and is waited for."""
    if torch.compiler.is_dynamo_compiling():
        return True
    if not torch.compiler.is_compiling():
        return False
    with CAPTURING:
        return torch.compiler.is_compiling()
