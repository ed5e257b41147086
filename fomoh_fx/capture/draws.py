"""Numbers that a model draws from Python's or NumPy's global generator while it runs.

A graph has them as constants, so that every call would have the numbers of the first. That is right only where nothing
depends on them, as on the draw that drops a layer with probability zero.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from fomoh_fx.capture.program import Program
from fomoh_fx.errors import CaptureError

#: The ends of [0, 1): what a draw is compared with lies between them.
_ENDS = (0.0, 1 - 2.0**-53)


def refuse_drawn(capture: Callable[[], Program]) -> Program:
    """What is captured, if it does not depend on such draws.

    Raises:
        CaptureError: the graph changes with the numbers.
    """
    before = _state()
    program = capture()
    after = _state()
    if after == before:
        return program
    for end in _ENDS:
        with _draws_at(end):
            again = capture()
        if not same_graph(program, again):
            raise CaptureError(
                "model: draws from Python's or NumPy's random numbers while it runs, and computes with them, so the "
                "graph would have the numbers of its first call for ever. Draw with torch, or pass them as arguments"
            )
    return program


def _state() -> list[Any]:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return [random.getstate()]
    name, keys, *rest = numpy.random.get_state()
    return [random.getstate(), name, keys.tolist(), *rest]


@contextmanager
def _draws_at(end: float) -> Iterator[None]:
    """Uniform draws give one end of their interval; the others go on."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(random, "random", lambda: end))
        stack.enter_context(patch.object(random, "uniform", lambda a, b: a + (b - a) * end))
        if (numpy := sys.modules.get("numpy")) is not None:

            def filled(low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
                value = low + (high - low) * end
                return value if size is None else numpy.full(size, value)

            for name in ("random", "random_sample"):
                stack.enter_context(patch.object(numpy.random, name, lambda size=None: filled(size=size)))
            stack.enter_context(patch.object(numpy.random, "rand", lambda *size: filled(size=size or None)))
            stack.enter_context(patch.object(numpy.random, "uniform", filled))
        yield


def same_graph(one: Program, other: Program) -> bool:
    """Whether two captures are of the same operations on the same constants."""
    ours, theirs = (
        [what.tensor for what in p.inputs if what.tensor is not None] + list(p.module.buffers()) for p in (one, other)
    )
    same = one.module.code == other.module.code and len(ours) == len(theirs)
    return same and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
