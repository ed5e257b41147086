"""Compiling: how long it takes, how many nodes and kernels come of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._inductor import metrics
from torch._inductor.utils import fresh_cache

from benchmarks import bound
from benchmarks.contenders import ours
from benchmarks.contenders.base import Options
from benchmarks.problem import Problem
from fomoh_fx.passes.outline import outline
from fomoh_fx.passes.pipeline import copy_of

Row = dict[str, Any]


def measure(problem: Problem, options: Options) -> Row:
    """Cold: without what earlier runs left in Inductor's caches."""
    hd = ours.hyperdual(problem, options)
    arguments: Row = {"tangents": problem.tangents, "targets": (problem.y,)}
    start = time.perf_counter()
    specialization = hd.trace(problem.x, **arguments)
    transformed = time.perf_counter() - start
    counts = {name: nodes(stage) for name, stage in hd.stages.items()}
    final = list(counts)[-1]
    inputs = [what.value((problem.x, problem.y)) for what in specialization.program.inputs]
    normalized = hd.stages["normalize"]
    primal = options.compile(outline(copy_of(normalized)), fullgraph=True)  # lowered as the expansion is
    cold(lambda: options.compile(torch.tanh)(torch.ones(8, device=problem.device)))  # Inductor's own first time
    alone = cold(lambda: primal(*inputs))
    whole = cold(lambda: hd(problem.x, **arguments))
    report = hd.report()
    return {
        "transform_seconds": transformed,
        "nodes": counts,
        "nodes_ratio": counts[final] / counts["normalize"],
        "compile_seconds": whole["seconds"],
        "primal_compile_seconds": alone["seconds"],
        "kernels": whole["kernels"],
        "primal_kernels": alone["kernels"],
        "kernels_ratio": whole["kernels"] / max(alone["kernels"], 1),
        "products": dict(report.products),
        "estimated_peak_bytes": report.peak_bytes,
        "gigaflops": bound.flops(problem) / 1e9,
    }


def nodes(module: fx.GraphModule) -> int:
    """Operations."""
    return sum(n.op == "call_function" for n in module.graph.nodes)


@torch.no_grad()
def cold(first_call: Callable[[], Any]) -> Row:
    """The first call of a compiled function, its time that of compiling for the most part."""
    torch._dynamo.reset()
    metrics.reset()
    with fresh_cache():
        start = time.perf_counter()
        first_call()
        return {"seconds": time.perf_counter() - start, "kernels": metrics.generated_kernel_count}
