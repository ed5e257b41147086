"""Judging one operator: exact on every confirmed sample, refused by a named error, without oracle, or wrong.

Samples are transformed together, a dozen in one function, because a capture costs as much as many operators; where
one of them is refused, and where values are random, each is transformed on its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch._export import utils as export_utils

import fomoh_fx
from fomoh_fx.passes.activity import analyse
from fomoh_fx.passes.normalize import inputs_of, results_of
from fomoh_fx.rules.registry import COMPOSITES, KINDS, RULES, Operator
from tests.coverage.isolation import isolated
from tests.coverage.samples import Case, cases, operators
from tests.coverage.table import Verdict
from tests.coverage.truth import Truth, confirmed_truth
from tests.oracle import relative_error

K = 2
TOGETHER = 12
TIMEOUT = 600.0  # seconds for all samples of one operator


@dataclass
class Expansion:
    """What the expansion computes for one case: the projections of primal, tangents [K] and crosses [K, K]."""

    primal: Tensor
    tangents: Tensor
    crosses: Tensor


def judge_all(names: Sequence[str], most: int | None = None, jobs: int = 2) -> Iterator[Verdict]:
    """Each operator in a process of its own, as they finish."""
    known = operators()
    torch.set_num_threads(1)
    with _quick_capture():
        fomoh_fx.transform(torch.sin, wrt="inputs")(torch.ones(1), tangents=(torch.ones(1, 1),))  # loads what is lazy
        for name, result in isolated(lambda name: judge(name, known[name], most), names, jobs, TIMEOUT):
            yield result if isinstance(result, Verdict) else Verdict(name, "crash", reason=result)


def judge(name: str, op: Any, most: int | None = None) -> Verdict:
    """Compare the expansion with the oracles on all samples (at most ``most``)."""
    verdict = Verdict(name)
    with warnings.catch_warnings(), _quick_capture():
        warnings.simplefilter("ignore")
        samples = list(cases(name, op, most=most))
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
            for case in group:
                _judge_together([case], verdict, random)
        elif isinstance(error, fomoh_fx.FomohError):
            confirmed = truth_of(group[0]) is not None
            verdict.confirmed += confirmed
            verdict.add("refused" if confirmed else "no oracle", f"{group[0].name}: {_first_lines(error)}")
        else:
            verdict.add("crash", f"{group[0].name}: {type(error).__name__}: {_first_lines(error)}")
        return
    verdict.served = sorted({*verdict.served, *kinds})
    for case, expansion in zip(group, found, strict=True):
        primal = case.projected(*case.points)
        differs = _differs(expansion.primal, primal)
        redrawn = differs and random  # the graph draws other numbers than eager mode: it is compared with itself
        truth = (
            confirmed_truth(evaluate, case.points, directions_of(case), case.tolerance) if redrawn else truth_of(case)
        )
        if truth is None or not primal.isfinite():
            verdict.add("no oracle")
            continue
        verdict.confirmed += 1
        errors = truth.errors(expansion.tangents, expansion.crosses)
        if differs and not redrawn:
            verdict.add("wrong", f"{case.name}: value off by {relative_error(expansion.primal, primal):.1e}")
        elif max(errors) > truth.tolerance:
            kind = "differences" if truth.tolerance > 1e-6 else "reverse"
            verdict.add(
                "wrong", f"{case.name}: tangent off by {errors[0]:.1e}, cross by {errors[1]:.1e} (truth by {kind})"
            )
        else:
            verdict.add("exact")


def truth_of(case: Case) -> Truth | None:
    """The confirmed truth of the projection of a case."""
    return confirmed_truth(case.projected, case.points, directions_of(case), case.tolerance)


def directions_of(case: Case) -> list[Tensor]:
    """K fixed random directions for each active input."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(K, *x.shape, dtype=_double(x), generator=generator).to(x.dtype) for x in case.points]


def _double(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.is_complex() else torch.float64


def expand(group: Sequence[Case]) -> tuple[list[Expansion], Callable[..., Tensor], set[str]]:
    """Transform the cases as one function: their expansions, the first one's own value, and how it was served."""

    def function(*values: Tensor) -> list[list[Tensor]]:
        given = iter(values)
        return [case.function(*islice(given, len(case.inputs))) for case in group]

    inputs = [x for case in group for x in case.inputs]
    tangents: list[Tensor | None] = []
    for case in group:
        given = iter(directions_of(case))
        tangents += [next(given) if active else None for active in case.active]
    hd = fomoh_fx.transform(function, wrt="inputs")

    def run(values: Sequence[Tensor]) -> fomoh_fx.HyperDual:
        hd.trace(*values, tangents=tuple(tangents))  # before the seed is set: tracing may draw
        torch.manual_seed(0)
        return hd(*values, tangents=tuple(tangents))

    out = run(inputs)
    found = [
        Expansion(case.project(p), case.project(t, 1), case.project(c, 2))
        for case, p, t, c in zip(group, out.primal, out.tangent, out.hessian(), strict=True)
    ]
    return found, lambda *values: group[0].project(run(group[0].filled(values)).primal[0]), served_by(hd.latest)


def served_by(specialization: Any) -> set[str]:
    """The kinds of rules of the captured operators on active paths.

    ``composite`` is a body of our own, ``decomposed`` one of PyTorch's, ``synthesised`` a rule from PyTorch's
    derivative formula.
    """
    program, stages = specialization.program, specialization.stages
    graph = stages["capture"].graph
    seeds = [inputs_of(stages["capture"])[i] for i in specialization.seeds.positions(program)]
    active = analyse(graph, seeds, results_of(stages["capture"])).active
    kept = {node.target for node in stages["normalize"].graph.nodes}
    kinds = set()
    for node in active:
        if isinstance(node.target, Operator):
            unknown = "synthesised" if node.target in kept else "decomposed"
            body = "composite" if node.target in COMPOSITES else unknown
            kinds.add(KINDS.get(node.target, "own rule") if node.target in RULES else body)
    for node in stages["normalize"].graph.nodes:  # what PyTorch's decompositions led to
        if isinstance(node.target, Operator) and node.target not in RULES and _is_expanded(node, specialization):
            kinds.add("synthesised")
    return kinds


def _is_expanded(node: torch.fx.Node, specialization: Any) -> bool:
    stages, program = specialization.stages, specialization.program
    seeds = [inputs_of(stages["normalize"])[i] for i in specialization.seeds.positions(program)]
    return node in analyse(stages["normalize"].graph, seeds, results_of(stages["normalize"])).active


def _differs(actual: Tensor, expected: Tensor) -> bool:
    same = torch.isclose(actual, expected.detach(), rtol=1e-9, atol=1e-9, equal_nan=True)
    return not bool(same.all())


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:2])[:240]


@contextmanager
def _quick_capture() -> Iterator[None]:
    """Export asks the dispatcher for its composite operators five times a capture; here they are known already."""
    export_utils._materialize_cpp_cia_ops()
    before = export_utils._materialize_cpp_cia_ops
    export_utils._materialize_cpp_cia_ops = lambda: None
    try:
        yield
    finally:
        export_utils._materialize_cpp_cia_ops = before
