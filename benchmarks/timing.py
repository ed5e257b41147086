"""Timing: contenders in turn, and medians of the ratios of times that were taken right after each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.contenders.base import Run

#: Enough for quartiles, however long a round takes.
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Ratio:
    """A contender's time over that of the base in the same round: the median and the quartiles."""

    median: float
    low: float
    high: float


def interleaved(
    runs: Mapping[str, Run], rounds: int, budget: float, report: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Every contender once in each round, forwards and backwards in turn, until ``budget`` seconds have passed."""
    for run in runs.values():
        run.seconds()  # warm
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, start = list(runs.items()), time.perf_counter()
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - start > budget:
            break
        for name, run in order if done % 2 == 0 else reversed(order):
            times[name].append(run.seconds())
        report()
    return times


def ratio(times: list[float], base: list[float]) -> Ratio:
    pairs = [a / b for a, b in zip(times, base, strict=True)]
    if len(pairs) < 2:
        return Ratio(pairs[0], pairs[0], pairs[0])
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return Ratio(middle, low, high)
