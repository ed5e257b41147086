"""The bound: the matrix products and convolutions of our own program, run alone, back to back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import ours
from benchmarks.contenders.base import Local, Options
from benchmarks.problem import Problem
from fomoh_fx.inspect.statistics import PRODUCTS


def products(problem: Problem, options: Options) -> Local:
    """On random values of the same shapes and strides."""
    hd = ours.hyperdual(problem, options, compiled=False)
    hd.trace(problem.x, tangents=problem.tangents, targets=(problem.y,))
    final = list(hd.stages.values())[-1]
    calls = [call_of(node, problem.device) for node in final.graph.nodes if node.target in PRODUCTS]

    @torch.no_grad()
    def run() -> None:
        for function, args, kwargs in calls:
            function(*args, **kwargs)

    return Local(run, problem.device, lambda nothing: {})


def call_of(node: fx.Node, device: torch.device) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The operator with arguments made up."""
    args, kwargs = pytree.tree_map_only(fx.Node, lambda n: made(n.meta["val"], device), (node.args, dict(node.kwargs)))
    return node.target, args, kwargs  # type: ignore[return-value]


def made(value: Tensor, device: torch.device) -> Tensor:
    """Random, laid out like a value of the trace."""
    extent = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    return torch.randn(max(extent, 0), dtype=value.dtype, device=device).as_strided(value.shape, value.stride())


def flops(problem: Problem) -> int:
    """Of the products of our program, two for each multiplication with its addition."""
    run = products(problem, Options()).function
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
