"""Bounds: matrix products and convolutions run alone, back to back.

``products`` runs those of our own program. ``folded`` runs the fewest calls that the primal's products expand to in the
K x K form, whatever our program does: with a weight w, (x, x_i, x_ij) times w as one, x times all w_i as one, and all
x_i times all w_j as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import conv2d, linear
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import fomoh_fx
from benchmarks.contenders import ours
from benchmarks.contenders.base import Absent, Local, Options
from benchmarks.problem import Problem
from fomoh_fx.inspect.statistics import PRODUCTS
from fomoh_fx.passes import provenance

aten = torch.ops.aten

#: Operators that hand the cross component of one argument on as it is, without a node of their own.
PASSED_ON = {aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.alias.default}

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def products(problem: Problem, options: Options) -> Local:
    """On random values of the same shapes and strides."""
    final = list(_traced(problem, options).stages.values())[-1]
    return _run(problem, [_call_of(n, problem.device) for n in final.graph.nodes if n.target in PRODUCTS])


def folded(problem: Problem, options: Options) -> Local:
    """Of linear layers, convolutions and products of batches of matrices."""
    hd = _traced(problem, options)
    specialization, normalized = hd.latest, hd.stages["normalize"]
    inputs = normalized.graph.find_nodes(op="placeholder")
    active = {inputs[i] for i in specialization.seeds.positions(specialization.program)}
    origins = [provenance.of(n) for n in hd.stages["expand"].graph.nodes]
    curved = {origin.primal for origin in origins if origin.component == "cross"}
    calls: list[Call] = []
    for node in normalized.graph.nodes:
        if any(used in active for used in node.all_input_nodes):
            active.add(node)
            if node.target in PASSED_ON and any(used.name in curved for used in node.all_input_nodes):
                curved.add(node.name)
            calls += _expanded(problem, node, active, curved)
    return _run(problem, calls)


def flops(problem: Problem) -> int:
    """Of the products of our program, two for each multiplication with its addition."""
    run = products(problem, Options()).function
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _traced(problem: Problem, options: Options) -> fomoh_fx.HyperDualModule:
    hd = ours.hyperdual(problem, options, compiled=False)
    hd.trace(problem.x, tangents=problem.tangents, targets=(problem.y,))
    return hd


def _run(problem: Problem, calls: Sequence[Call]) -> Local:
    @torch.no_grad()
    def run() -> None:
        for function, args, kwargs in calls:
            function(*args, **kwargs)

    return Local(run, problem.device, lambda nothing: {})


def _call_of(node: fx.Node, device: torch.device) -> Call:
    """The operator with arguments made up."""
    args, kwargs = pytree.tree_map_only(fx.Node, lambda n: _made(n.meta["val"], device), (node.args, dict(node.kwargs)))
    return node.target, args, kwargs  # type: ignore[return-value]


def _made(value: Tensor, device: torch.device) -> Tensor:
    """Random, laid out like a value of the trace."""
    extent = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    return torch.randn(max(extent, 0), dtype=value.dtype, device=device).as_strided(value.shape, value.stride())


def _expanded(problem: Problem, node: fx.Node, active: set[fx.Node], curved: set[str]) -> Iterator[Call]:
    """The products of all components of one product."""
    k = problem.directions
    hessian = problem.curvature == "hessian"
    first = node.args[0] if node.args else None
    second = k * (k + 1) // 2 if isinstance(first, fx.Node) and first.name in curved else 0

    def made(shape: Sequence[int], times: int) -> Tensor:
        return torch.randn(times * shape[0], *shape[1:], dtype=problem.dtype, device=problem.device)

    if node.target in (aten.linear.default, aten.convolution.default):
        x, w = (used.meta["val"].shape for used in node.args[:2])  # type: ignore[union-attr]
        function, kwargs = _product(node)
        if first not in active:
            yield function, (made(x, 1), made(w, 1 + k)), kwargs
            return
        yield function, (made(x, 1 + k + second), made(w, 1)), kwargs
        yield function, (made(x, 1), made(w, k)), kwargs
        if hessian:
            yield function, (made(x, k), made(w, k)), kwargs
    elif node.target is aten.bmm.default:
        both = all(used in active for used in node.args)
        times = 1 + 2 * k + (2 * second + k * k if hessian else 0) if both else 1 + k + second
        x, w = (used.meta["val"].shape for used in node.args)  # type: ignore[union-attr]
        yield torch.bmm, (made(x, times), made(w, times)), {}
    elif node.target in PRODUCTS:
        raise Absent(f"{node.target} is not folded here")


def _product(node: fx.Node) -> tuple[Callable[..., Any], dict[str, Any]]:
    if node.target is aten.linear.default:
        return linear, {}
    stride, padding, dilation, transposed, _, groups = node.args[3:]
    if transposed or groups != 1:
        raise Absent("a transposed or grouped convolution is not folded here")
    return conv2d, {"stride": stride, "padding": padding, "dilation": dilation}
