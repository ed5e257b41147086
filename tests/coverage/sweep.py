"""Judging one operator: exact on every confirmed sample, refused by a named error, without oracle, or wrong."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fomoh_fx
from tests.coverage.samples import Case, cases

K = 2
STEPS = (1e-4, 3e-5)


@dataclass
class Verdict:
    """What became of an operator.

    ``outcome`` is ``exact``, ``refused``, ``wrong``, ``no oracle``, or ``not floating`` (no sample has a floating-point
    input and output).
    """

    name: str
    outcome: str
    samples: int = 0
    confirmed: int = 0
    served: list[str] = field(default_factory=list)
    reason: str = ""


@dataclass
class Truth:
    """Slopes [K] and curvatures [K, K], and how far to trust them."""

    slopes: Tensor
    curvatures: Tensor
    tolerance: float


def judge(name: str, op: Any, most: int | None = None) -> Verdict:
    """Compare the expansion with the oracles on all samples (at most ``most``)."""
    verdict = Verdict(name, "not floating")
    outcomes: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases(name, op, most=most):
            verdict.samples += 1
            outcome, reason = judge_case(case, verdict)
            outcomes.add(outcome)
            if reason and (not verdict.reason or outcome == "wrong"):
                verdict.reason = f"{case.name}: {reason}"
    for outcome in ("wrong", "refused", "exact", "no oracle"):
        if outcome in outcomes:
            verdict.outcome = outcome
            break
    return verdict


def judge_case(case: Case, verdict: Verdict) -> tuple[str, str]:
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(K, *x.shape, dtype=x.dtype, generator=generator) for x in case.inputs]
    truth = confirmed_truth(case, directions)
    try:
        torch.manual_seed(0)
        hd = fomoh_fx.transform(case.function, wrt="inputs")
        hd.trace(*case.inputs, tangents=tuple(directions))
        torch.manual_seed(0)
        out = hd(*case.inputs, tangents=tuple(directions))
    except fomoh_fx.FomohError as error:
        return ("refused", _first_line(error)) if truth is not None else ("no oracle", _first_line(error))
    verdict.served = sorted({*verdict.served, *hd.report().served.values()}) if hasattr(hd.report(), "served") else []
    if truth is None:
        return "no oracle", ""
    verdict.confirmed += 1
    errors = [_error(out.tangent, truth.slopes), _error(out.hessian(), truth.curvatures)]
    if max(errors) <= truth.tolerance:
        return "exact", ""
    return "wrong", f"tangent off by {errors[0]:.1e}, cross by {errors[1]:.1e}"


def confirmed_truth(case: Case, directions: Sequence[Tensor]) -> Truth | None:
    """Reverse-over-reverse where finite differences agree; finite differences alone where two steps agree."""
    reverse = _attempt(lambda: reverse_over_reverse(case, directions))
    differences = _attempt(lambda: finite_differences(case, directions, STEPS[0]))
    if reverse is not None and _finite(reverse):
        if differences is not None and _agree(reverse, differences, 1e-4):
            return Truth(*reverse, tolerance=1e-8)
        if differences is None or not _finite(differences):
            return Truth(*reverse, tolerance=1e-8)
    again = _attempt(lambda: finite_differences(case, directions, STEPS[1]))
    if differences is not None and again is not None and _finite(again) and _agree(differences, again, 1e-4):
        return Truth(*differences, tolerance=1e-3)
    return None


def _attempt(compute: Any) -> tuple[Tensor, Tensor] | None:
    try:
        return compute()
    except Exception:  # an oracle without answer
        return None


def reverse_over_reverse(case: Case, directions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(0)
        xs = [x.clone().requires_grad_() for x in case.inputs]
        y = case.function(*xs)
        gradient = _gradient(y, xs)
        slopes = torch.stack([_inner(gradient, [d[i] for d in directions]) for i in range(K)])
        rows = []
        for slope in slopes:
            second = _gradient(slope, xs)
            rows.append(torch.stack([_inner(second, [d[j] for d in directions]) for j in range(K)]))
        return slopes.detach(), torch.stack(rows).detach()


def _gradient(y: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    if not y.requires_grad:
        return [torch.zeros_like(x) for x in xs]
    found = torch.autograd.grad(y, xs, create_graph=True, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, xs, strict=True)]


def _inner(gradient: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
    """The directional derivative; PyTorch's gradient of a complex input is conjugated."""
    terms = [(g.conj() * d).sum() for g, d in zip(gradient, direction, strict=True)]
    return torch.stack([t.real if t.is_complex() else t for t in terms]).sum()


def finite_differences(case: Case, directions: Sequence[Tensor], step: float) -> tuple[Tensor, Tensor]:
    def at(*moves: tuple[int, float]) -> Tensor:
        torch.manual_seed(0)
        moved = [
            x + sum((h * d[i] for i, h in moves), torch.zeros_like(x))
            for x, d in zip(case.inputs, directions, strict=True)
        ]
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return case.function(*moved)

    slopes = torch.stack([(at((i, step)) - at((i, -step))) / (2 * step) for i in range(K)])
    signs = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    curvatures = torch.stack(
        [
            torch.stack(
                [sum(s * t * at((i, s * step), (j, t * step)) for s, t in signs) / (4 * step**2) for j in range(K)]
            )
            for i in range(K)
        ]
    )
    return slopes, curvatures


def _finite(values: tuple[Tensor, Tensor]) -> bool:
    return all(bool(v.isfinite().all()) for v in values)


def _agree(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], tolerance: float) -> bool:
    """Slopes to the tolerance, curvatures to ten times it: a second difference loses twice the digits."""
    return _error(b[0], a[0]) <= tolerance and _error(b[1], a[1]) <= 10 * tolerance


def _error(actual: Any, expected: Tensor) -> float:
    difference = (actual - expected).norm() / expected.norm().clamp_min(1.0)
    return float("inf") if difference.isnan() else float(difference)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:2])[:200]
