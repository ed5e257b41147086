"""What a contender is: a function of a problem and the options that returns a run, or raises Absent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.clock import seconds
from benchmarks.memory import peaks


class Absent(Exception):
    """This peer is not installed, or does not do this work; the message says which."""


@dataclass(frozen=True)
class Options:
    """Where the peers are.

    Attributes:
        fomoh: the folder that holds the authors' package ``fomoh``.
        jet: a folder to import ``jet`` from, where it is not installed.
        jax: a Python interpreter that has JAX.
        mode: of ``torch.compile``, for all that use it.
    """

    fomoh: Path | None = None
    jet: Path | None = None
    jax: Path | None = None
    mode: str | None = None

    def compile(self, function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, mode=self.mode, **settings)


class Run(Protocol):
    """A contender's work on one problem, ready to be repeated."""

    def seconds(self) -> float:
        """The time of one repetition."""
        ...

    def result(self) -> Mapping[str, Tensor]:
        """What one repetition computes, by the names of :data:`benchmarks.problem.Result`."""
        ...

    def memory(self) -> Mapping[str, int | None]:
        """What one repetition takes at most: see :mod:`benchmarks.memory`."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


@dataclass
class Local:
    """In this process: ``function`` is timed, and ``finish`` turns what it returns into a result."""

    function: Callable[[], Any]
    device: torch.device
    finish: Callable[[Any], Mapping[str, Tensor]] = field(default=lambda result: result)

    def seconds(self) -> float:
        return seconds(self.function, self.device)

    def result(self) -> Mapping[str, Tensor]:
        return self.finish(self.function())

    def memory(self) -> Mapping[str, int | None]:
        return peaks(self.function, self.device)

    def close(self) -> None:
        pass


def plane_of(parts: Any) -> dict[str, Tensor]:
    """(value, slopes, plane) by name."""
    return dict(zip(("value", "slopes", "plane"), parts, strict=True))
