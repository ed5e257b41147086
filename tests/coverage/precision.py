"""Judging one operator in lower precision: it runs, keeps the dtype, and is near its own value in double precision.

Near is within a tolerance, or no further off than a few times what reverse mode is in the same precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fomoh_fx
from tests.coverage.expansion import Expansion, directions_of, expand
from tests.coverage.samples import Case, cases
from tests.coverage.sweep import TOGETHER, halves
from tests.coverage.table import Verdict
from tests.oracle import relative_error, reverse_over_reverse

NEAR = {torch.float32: 1e-3, torch.complex64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
FACTOR = 4.0


def judge_precision(name: str, op: Any, most: int | None, dtype: torch.dtype) -> Verdict:
    """Compare the expansion in ``dtype`` with the one in double precision, at the same inputs."""
    verdict = Verdict(name)
    samples = [case for case in cases(name, op, dtype, most) if not case.is_random]
    verdict.samples = len(samples)
    for start in range(0, len(samples), TOGETHER):
        _judge_together(samples[start : start + TOGETHER], verdict, dtype)
    return verdict


def _judge_together(group: Sequence[Case], verdict: Verdict, dtype: torch.dtype) -> None:
    try:
        found, _, kinds = expand(group)
        references, _, _ = expand([_in_double(case) for case in group])
    except Exception as error:
        if len(group) > 1:
            for part in halves(group):
                _judge_together(part, verdict, dtype)
        else:
            refused = isinstance(error, fomoh_fx.FomohError)
            verdict.add("refused" if refused else "crash", f"{group[0].name}: {type(error).__name__}: {error}"[:300])
        return
    verdict.served = sorted({*verdict.served, *kinds})
    for case, expansion, reference in zip(group, found, references, strict=True):
        reason = _changed_dtype(expansion) or _far(case, expansion, reference, NEAR[dtype])
        verdict.confirmed += 1
        verdict.add("wrong" if reason else "exact", f"{case.name}: {reason}" if reason else "")


def _in_double(case: Case) -> Case:
    return replace(case, inputs=[x.to(_double(x)) for x in case.inputs])


def _double(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.is_complex() else torch.float64 if x.is_floating_point() else x.dtype


def _changed_dtype(expansion: Expansion) -> str:
    for output in expansion.outputs:
        for part in ("tangent", "cross"):
            if (found := getattr(output, part).dtype) != output.primal.dtype:
                return f"{part} has dtype {found}, not {output.primal.dtype}"
    return ""


def _far(case: Case, expansion: Expansion, reference: Expansion, tolerance: float) -> str:
    """Why the tangents or crosses are not near the reference's; empty if they are, or where that is not finite."""
    for part in ("tangents", "crosses"):
        expected, actual = getattr(reference, part), getattr(expansion, part)
        if not expected.isfinite().all():
            continue
        error = _error(actual, expected)
        if error > tolerance:
            reverse = _error(_by_reverse(case, part), expected)
            if not error <= FACTOR * reverse:
                return f"{part} off by {error:.1e}, by reverse mode {reverse:.1e}"
    return ""


def _error(actual: Tensor | None, expected: Tensor) -> float:
    error = float("inf") if actual is None else relative_error(actual, expected)
    return error if error == error else float("inf")


def _by_reverse(case: Case, part: str) -> Tensor | None:
    try:
        _, tangents, crosses = reverse_over_reverse(case.projected, case.points, directions_of(case))
    except RuntimeError:  # no double backward
        return None
    return {"tangents": tangents, "crosses": crosses}[part]
