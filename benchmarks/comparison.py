"""One comparison: prepare every contender, check what it computes, and time all of them in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.contenders.base import Absent, Run
from benchmarks.problem import Result, errors
from benchmarks.suite import BASE
from benchmarks.timing import interleaved, ratio

Row = dict[str, Any]


def prepared(
    makers: Mapping[str, Callable[[], Run]], label: str, expected: Result, tolerance: float
) -> tuple[dict[str, Run], dict[str, Row]]:
    """Every contender that can, compiled and checked by its first run; a row for each, or why it cannot."""
    torch._dynamo.reset()
    runs: dict[str, Run] = {}
    rows: dict[str, Row] = {}
    with tqdm(makers.items(), desc=label, leave=False, dynamic_ncols=True) as progress:
        for name, make in progress:
            progress.set_postfix_str(name)
            start = time.perf_counter()
            try:
                run = make()
                found = errors(run.result(), expected)
            except Absent as reason:
                rows[name] = {"absent": str(reason)}
            except Exception as error:  # a peer that fails is a result, too
                if name == BASE:
                    raise
                rows[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            else:
                runs[name], rows[name] = (
                    run,
                    {
                        "prepare_seconds": time.perf_counter() - start,
                        "errors": found,
                        "right": all(error <= tolerance for error in found.values()),
                    },
                )
    return runs, rows


def compare(
    makers: Mapping[str, Callable[[], Run]],
    expected: Result,
    tolerance: float,
    common: Row,
    rounds: int,
    budget: float,
) -> list[Row]:
    """A row for each contender: its time, the ratio to the base's, its errors, or why it is absent."""
    label = " ".join(str(value) for value in common.values() if value is not None)
    runs, rows = prepared(makers, label, expected, tolerance)
    with tqdm(total=rounds, desc=label, leave=False, dynamic_ncols=True) as progress:
        times = interleaved(runs, rounds, budget, progress.update)
    for name, run in runs.items():
        rows[name] |= {
            "seconds": statistics.median(times[name]),
            "fastest": min(times[name]),
            "rounds": len(times[name]),
            "ratio": asdict(ratio(times[name], times[BASE])),
        }
        run.close()
    return [{**common, "contender": name, **row} for name, row in rows.items()]
