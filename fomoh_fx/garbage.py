"""No garbage collection while a model is captured and expanded."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Graphs are made of objects that live to the end, which every collection would go through in vain.

    For one thread at a time, as those that capture are; a collector that is off stays so.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
