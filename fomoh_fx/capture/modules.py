"""Which modules a model calls while it runs: noticed before they run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn

from fomoh_fx.capture.threads import is_in


@contextmanager
def calls_noticed(notice: Callable[[nn.Module], None]) -> Iterator[None]:
    """Every module that this thread calls is noticed first.

    Not by a global hook: with one, a hook that a module installs in its forward would act already in that call.
    """
    thread, call = threading.get_ident(), nn.Module._call_impl

    def noticed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_in(thread):
            notice(module)
        return call(module, *args, **kwargs)

    noticed.unnoticed = getattr(call, "unnoticed", call)  # type: ignore[attr-defined]
    with patch.object(nn.Module, "_call_impl", noticed):
        yield


@contextmanager
def calls_unnoticed() -> Iterator[None]:
    """Calls are not noticed by those that notice them outside of this, which would keep the modules alive."""
    call = nn.Module._call_impl
    with patch.object(nn.Module, "_call_impl", getattr(call, "unnoticed", call)):
        yield
