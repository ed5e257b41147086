"""Judging one operator: exact on every confirmed sample, refused by a named error, without oracle, or wrong.

Derivatives are taken in every floating-point tensor; where these are refused or have no oracle (a loss's target, which
has to be a label), in those that the database asks for. Samples are transformed together where possible; where one of
them is refused, it is found by halves, and where values are random, each is transformed on its own.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import fomoh_fx
from tests.coverage.expansion import directions_of, expand
from tests.coverage.isolation import isolated
from tests.coverage.samples import Case, cases, operators
from tests.coverage.table import Verdict
from tests.coverage.truth import Truth, confirmed_truth, noise
from tests.oracle import relative_error

TOGETHER = 24
NOISE = 4.0  # an error of so many times what another rounding of the inputs does to reverse mode is its own
TIMEOUT = 3600.0  # seconds for all samples of one operator
Judge = Callable[[str, Any, int | None], Verdict]

#: Where reverse mode's own convention decides, which differences do not know.
BY_CONVENTION = {
    "normal": "a draw has no derivative in its parameters",
    "normal.number_mean": "a draw has no derivative in its parameters",
}


def judge_all(names: Sequence[str], judge_one: Judge, most: int | None = None, jobs: int = 2) -> Iterator[Verdict]:
    """Each operator in a process of its own, as they finish."""
    known = operators()
    torch.set_num_threads(1)
    torch._logging.set_logs(all=logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fomoh_fx.transform(torch.sin, wrt="inputs")(torch.ones(1), tangents=(torch.ones(1, 1),))  # loads what is lazy
        for name, result in isolated(lambda name: judge_one(name, known[name], most), names, jobs, TIMEOUT):
            yield result if isinstance(result, Verdict) else Verdict(name, "crash", reason=result)


def judge(name: str, op: Any, most: int | None = None, dtype: torch.dtype = torch.float64) -> Verdict:
    """Compare the expansion with the oracles on all samples (at most ``most``)."""
    verdict = Verdict(name)
    samples = list(cases(name, op, dtype, most))
    verdict.samples = len(samples)
    random = any(case.is_random for case in samples)
    together = 1 if random else TOGETHER
    for start in range(0, len(samples), together):
        _judge_together(samples[start : start + together], verdict, random)
    return verdict


def _judge_together(group: Sequence[Case], verdict: Verdict, random: bool) -> None:
    try:
        found, evaluate, kinds = expand(group)
    except Exception as error:
        if len(group) > 1:
            for part in halves(group):
                _judge_together(part, verdict, random)
        elif (asked := group[0].as_asked()) is not None:
            _judge_together([asked], verdict, random)
        elif isinstance(error, fomoh_fx.FomohError):
            confirmed = truth_of(group[0]) is not None
            verdict.confirmed += confirmed
            verdict.add("refused" if confirmed else "no oracle", f"{group[0].name}: {_first_lines(error)}")
        else:
            verdict.add("crash", f"{group[0].name}: {type(error).__name__}: {_first_lines(error)}")
        return
    verdict.served = sorted({*verdict.served, *kinds})
    again = []
    for case, expansion in zip(group, found, strict=True):
        primal = case.projected(*case.points)
        differs = _differs(expansion.primal, primal, case.tolerance)
        redrawn = differs and random  # the graph draws other numbers than eager mode: it is compared with itself
        truth = truth_of(case, evaluate if redrawn else None)
        if truth is None or not primal.isfinite():
            if (asked := case.as_asked()) is not None:
                again.append(asked)
            else:
                verdict.add("no oracle")
            continue
        verdict.confirmed += 1
        errors = truth.errors(expansion.tangents, expansion.crosses)
        if differs and not redrawn:
            verdict.add("wrong", f"{case.name}: value off by {relative_error(expansion.primal, primal):.1e}")
        elif max(errors) > truth.tolerance and max(errors) > NOISE * _noise(case, truth, evaluate if redrawn else None):
            reason = f"tangent off by {errors[0]:.1e}, cross by {errors[1]:.1e}, of {truth.source}"
            verdict.add("wrong", f"{case.name}: {reason}")
        else:
            verdict.add("exact")
    if again:
        _judge_together(again, verdict, random)


def halves(group: Sequence[Case]) -> list[Sequence[Case]]:
    """To find the cases that fail in a group that does."""
    middle = len(group) // 2
    return [group[:middle], group[middle:]]


def truth_of(case: Case, function: Callable[..., Tensor] | None = None) -> Truth | None:
    """The confirmed truth of the projection of a case, or of another function of its inputs."""
    by_convention = case.name.partition("[")[0] in BY_CONVENTION
    return confirmed_truth(
        function or case.projected, case.points, directions_of(case), case.tolerance, not by_convention
    )


def _noise(case: Case, truth: Truth, function: Callable[..., Tensor] | None) -> float:
    return noise(truth, function or case.projected, case.points, directions_of(case))


def _differs(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return not bool(torch.isclose(actual, expected.detach(), rtol=tolerance, atol=tolerance, equal_nan=True).all())


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:2])[:240]
