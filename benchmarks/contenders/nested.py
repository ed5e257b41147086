"""PyTorch's own transforms: vmap of jvp of jvp, in its forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy

from benchmarks.contenders.base import Absent, Local, Options, plane_of
from benchmarks.problem import Problem

aten = torch.ops.aten

Plane = tuple[Tensor, Tensor, Tensor]
Tensors = dict[str, Tensor]
Function = Callable[[Any], Tensor]


def square(function: Function, at: Any, directions: Any) -> Plane:
    """vmap(vmap(jvp(jvp))): 1 + 2K + K^2 components, since each jvp has a vmap of its own."""

    def pair(v: Any, w: Any) -> Plane:
        (value, first), (_, second) = jvp(lambda p: jvp(function, (p,), (v,)), (at,), (w,))
        return value, first, second

    value, first, second = vmap(vmap(pair, (None, 0)), (0, None))(directions, directions)
    return value[0, 0], first[:, 0], second


def single(function: Function, at: Any, directions: Any) -> Plane:
    """K = 1 without vmap."""
    v = torch.utils._pytree.tree_map(lambda leaf: leaf[0], directions)
    (value, first), (_, second) = jvp(lambda p: jvp(function, (p,), (v,)), (at,), (v,))
    return value, first[None], second[None, None]


def gauss_newton(output: Function, loss: Function, at: Any, directions: Any, plane: Callable[..., Plane]) -> Plane:
    """The tangents of the output by one jvp for each direction, and the loss's plane along those."""
    pushed = vmap(lambda v: jvp(output, (at,), (v,)))(directions)
    return plane(loss, pushed[0][0], pushed[1])


def program(problem: Problem) -> Callable[..., Plane]:
    """(parameters, directions, x, y, buffers) -> (value, slopes, plane)."""
    plane = single if problem.directions == 1 else square

    def evaluate(parameters: Tensors, directions: Tensors, x: Tensor, y: Tensor, buffers: Tensors) -> Plane:
        def output(p: Tensors) -> Tensor:
            return functional_call(problem.module, {**p, **buffers}, (x,))

        if problem.curvature == "ggn":
            return gauss_newton(output, lambda z: cross_entropy(z, y), parameters, directions, plane)
        return plane(lambda p: cross_entropy(output(p), y), parameters, directions)

    return evaluate


def arguments_of(problem: Problem) -> tuple[Any, ...]:
    return problem.parameters, problem.tangents, problem.x, problem.y, dict(problem.module.named_buffers())


def _run(problem: Problem, function: Callable[..., Plane]) -> Local:
    arguments = arguments_of(problem)

    def evaluate() -> Plane:
        with torch.no_grad():
            return function(*arguments)

    return Local(evaluate, problem.device, plane_of)


def eager(problem: Problem, options: Options) -> Local:
    return _run(problem, program(problem))


def compiled(problem: Problem, options: Options) -> Local:
    """As one would write it."""
    if problem.directions == 1:
        raise Absent("Inductor crashes on the zero tensors that jvp leaves in the graph at K = 1")
    return _run(problem, options.compile(program(problem)))


def traced(problem: Problem, options: Options) -> Local:
    """The operators that the transforms run, in one graph without zero tensors, compiled."""
    with torch.no_grad():
        graph = without_zero_tensors(make_fx(program(problem))(*arguments_of(problem)))
    return _run(problem, options.compile(graph))


def without_zero_tensors(module: fx.GraphModule) -> fx.GraphModule:
    """Real zeros in place of those that have no memory, which Inductor's code would read."""
    for node in module.graph.nodes:
        if node.target is aten._efficientzerotensor.default:
            node.target = aten.zeros.default
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def laplacian_forward(model: nn.Module, x: Tensor, options: Options) -> Local:
    """The sum over the unit directions of jvp of jvp."""
    units = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)

    def along(x: Tensor, unit: Tensor) -> Tensor:
        v = unit.expand_as(x)
        return jvp(lambda a: jvp(model, (a,), (v,))[1], (x,), (v,))[1]

    return _laplacian(lambda x, units: vmap(along, (None, 0))(x, units).sum(0), x, units, options)


def laplacian_hessian(model: nn.Module, x: Tensor, options: Options) -> Local:
    """The trace of torch.func.hessian (forward over reverse) of each sample."""
    return _laplacian(
        lambda x, units: vmap(lambda a: hessian(model)(a).diagonal(dim1=-2, dim2=-1).sum(-1))(x), x, x, options
    )


def _laplacian(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, units: Tensor, options: Options) -> Local:
    with torch.no_grad():
        graph = without_zero_tensors(make_fx(function)(x, units))
    run = options.compile(graph)

    def evaluate() -> Tensor:
        with torch.no_grad():
            return run(x, units)

    return Local(evaluate, x.device, lambda value: {"laplacian": value})
