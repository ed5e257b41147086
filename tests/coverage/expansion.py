"""Cases through the compiler: several in one function, because a capture costs as much as many operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

import fomoh_fx
from fomoh_fx.passes.activity import analyse
from fomoh_fx.passes.normalize import inputs_of, results_of
from fomoh_fx.rules.registry import COMPOSITES, KINDS, RULES, Operator
from tests.coverage.samples import Case

K = 2


@dataclass
class Expansion:
    """What the expansion computes for one case: each output with its components, and their projections."""

    outputs: list[fomoh_fx.HyperDual]
    primal: Tensor
    tangents: Tensor
    crosses: Tensor


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
        Expansion(
            [fomoh_fx.HyperDual(*parts) for parts in zip(p, t, c, strict=True)],
            case.project(p),
            case.project(t, 1),
            case.project(c, 2),
        )
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
