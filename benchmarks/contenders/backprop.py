"""Reverse mode: one gradient, one gradient with one Hessian-vector product, checkpoints, and a step of SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, jvp
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from benchmarks.contenders.base import Absent, Local, Options
from benchmarks.problem import Problem, Result

Gradient = dict[str, Tensor]


def loss_of(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(module(x), y)


def checkpointed_loss_of(module: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """About sqrt(n) segments of n layers, whose inside is computed again in the backward pass."""
    layers = list(module)
    length = max(1, round(len(layers) ** 0.5))
    for start in range(0, len(layers), length):
        x = checkpoint(nn.Sequential(*layers[start : start + length]), x, use_reentrant=False)
    return cross_entropy(x, y)


def _gradient(problem: Problem, loss: Callable[..., Tensor]) -> Local:
    parameters = list(problem.module.parameters())

    def evaluate() -> tuple[Tensor, tuple[Tensor, ...]]:
        value = loss(problem.module, problem.x, problem.y)
        return value.detach(), torch.autograd.grad(value, parameters)

    def finish(parts: Any) -> Result:
        value, gradient = parts
        return {"value": value, "slopes": _along(problem, gradient)}

    return Local(evaluate, problem.device, finish)


def _along(problem: Problem, gradient: Any) -> Tensor:
    pairs = zip(problem.tangents.values(), gradient, strict=True)
    return sum((torch.einsum("k...,...->k", v, g) for v, g in pairs), torch.zeros((), device=problem.device))


def gradient(problem: Problem, options: Options) -> Local:
    return _gradient(problem, options.compile(loss_of))


def gradient_eager(problem: Problem, options: Options) -> Local:
    return _gradient(problem, loss_of)


def checkpointed(problem: Problem, options: Options) -> Local:
    return _gradient(problem, options.compile(checkpointed_loss_of))


def checkpointed_eager(problem: Problem, options: Options) -> Local:
    return _gradient(problem, checkpointed_loss_of)


def gradient_and_product(problem: Problem, options: Options) -> Local:
    """One gradient and one Hessian-vector product, forward over reverse."""
    if problem.curvature != "hessian":
        raise Absent("is a product with the Hessian")
    direction = {name: v[0] for name, v in problem.tangents.items()}

    def evaluate(parameters: Gradient, v: Gradient, x: Tensor, y: Tensor) -> Any:
        def loss(p: Gradient) -> Tensor:
            return cross_entropy(functional_call(problem.module, p, (x,)), y)

        (gradient, value), (product, _) = jvp(grad_and_value(loss), (parameters,), (v,))
        return value, gradient, product

    run = options.compile(evaluate)
    arguments = (problem.parameters, direction, problem.x, problem.y)

    def finish(parts: Any) -> Result:
        value, gradient, product = parts
        first = sum((product[name] * v).sum() for name, v in direction.items())
        return {"value": value, "slopes": _along(problem, gradient.values()), "first": first}

    return Local(lambda: run(*arguments), problem.device, finish)


def _sgd(problem: Problem, loss: Callable[..., Tensor]) -> Local:
    optimizer = torch.optim.SGD(problem.module.parameters(), lr=1e-6)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(problem.module, problem.x, problem.y)
        value.backward()
        optimizer.step()
        return value.detach()

    return Local(step, problem.device, lambda value: {"value": value})


def sgd(problem: Problem, options: Options) -> Local:
    return _sgd(problem, options.compile(loss_of))


def sgd_checkpointed(problem: Problem, options: Options) -> Local:
    return _sgd(problem, options.compile(checkpointed_loss_of))
