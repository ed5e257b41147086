"""Numbers that a model draws from Python's or NumPy's generators while it runs.

A graph has them as constants, so that every call would have the numbers of the first. That is right only where nothing
depends on them, as on the draw that drops a layer with probability zero. A draw from a generator object of the model's
(``numpy.random.default_rng()``), and a step of an iterator, is refused in any case.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from fomoh_fx.capture.advancing import advancing
from fomoh_fx.capture.program import Program
from fomoh_fx.capture.reading import are_equal
from fomoh_fx.capture.where import at_change_of
from fomoh_fx.errors import CaptureError
from fomoh_fx.passes.dataflow import graphs_in
from fomoh_fx.passes.provenance import is_hidden

#: The ends of [0, 1): what a draw is compared with lies between them.
_ENDS = (0.0, 1 - 2.0**-53)


def refuse_drawn(capture: Callable[[], Program], models: Sequence[Any], arguments: Sequence[Any]) -> Program:
    """What is captured, if it does not depend on such draws.

    Args:
        capture: what captures.
        models: the model and the loss.
        arguments: those of the call that are not tensors.

    Raises:
        CaptureError: the graph changes with the numbers, or a generator object has been drawn from.
    """
    before, objects = _state(), advancing(models, arguments)
    with _entropy_refused(), _seeding_refused():
        program = capture()
    after = _state()
    for thing in objects:
        if thing.has_advanced():
            raise thing.refusal()
    if after == before:
        return program
    for end in _ENDS:
        before = _state()
        with _draws_at(end):
            again = capture()
        if _state() != before or not same_graph(program, again):  # other draws may give the same again by chance
            raise CaptureError(
                "model: draws from Python's or NumPy's random numbers while it runs, and computes with them, so the "
                "graph would have the numbers of its first call for ever. Draw with torch, or pass them as arguments"
                + at_change_of(_state, capture)
            )
    return program


def _state() -> list[Any]:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return [random.getstate()]
    name, keys, *rest = numpy.random.get_state()
    return [random.getstate(), name, keys.tolist(), *rest]


@contextmanager
def _entropy_refused() -> Iterator[None]:
    """Refuse a NumPy generator that the model makes anew from the system's entropy."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        yield
        return
    make = numpy.random.default_rng

    def seeded(seed: Any = None) -> Any:
        if seed is None and not is_hidden(sys._getframe(1).f_code.co_filename):
            raise CaptureError(
                "model: makes a generator of random numbers by numpy.random.default_rng() while it runs, and the graph "
                "would have those of its first call for ever. Draw with torch, or pass them as arguments"
            )
        return make(seed)

    with patch.object(numpy.random, "default_rng", seeded):
        yield


@contextmanager
def _seeding_refused() -> Iterator[None]:
    """Refuse a model that seeds, sets or forks torch's generators: a graph draws on from where they are."""

    def refusing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            if not is_hidden(sys._getframe(1).f_code.co_filename):
                raise CaptureError(
                    f"model: calls torch.{name} while it runs, and a graph draws on from where torch's generator is. "
                    "Call it before, or draw before and pass the numbers as arguments"
                )
            return function(*args, **kwargs)

        return checked

    with ExitStack() as stack:
        for module, prefix in ((torch, ""), (torch.random, "random.")):
            for name in ("manual_seed", "seed", "set_rng_state", "fork_rng"):
                if (function := getattr(module, name, None)) is not None:
                    stack.enter_context(patch.object(module, name, refusing(prefix + name, function)))
        yield


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
    """Whether two captures are of the same operations on the same constants, in the bodies of operators too.

    So are the numbers and the like that they return.
    """
    ours, theirs = (
        [what.tensor for what in p.inputs if what.tensor is not None] + list(p.module.buffers()) for p in (one, other)
    )
    same = _code(one) == _code(other) and len(ours) == len(theirs)
    same = same and are_equal(one.structure.others, other.structure.others)
    return same and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _code(program: Program) -> list[str]:
    return [part.code for part in graphs_in(program.module)]
