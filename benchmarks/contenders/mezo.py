"""MeZO: two evaluations of the loss at parameters that are perturbed in place, and a step along the perturbation."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.contenders.backprop import loss_of
from benchmarks.contenders.base import Local, Options
from benchmarks.problem import Problem

SCALE = 1e-3
RATE = 1e-6


def step(problem: Problem, options: Options) -> Local:
    """The perturbation is drawn anew from its seed every time that it is needed, so that it takes no memory."""
    parameters = list(problem.module.parameters())
    generator = torch.Generator(problem.device)
    loss = options.compile(loss_of)

    def move(seed: int, amount: float | Tensor) -> None:
        generator.manual_seed(seed)
        for p in parameters:
            p.add_(torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator) * amount)

    @torch.no_grad()
    def evaluate() -> Tensor:
        seed = int(torch.randint(2**31, ()))
        move(seed, SCALE)
        above = loss(problem.module, problem.x, problem.y)
        move(seed, -2 * SCALE)
        below = loss(problem.module, problem.x, problem.y)
        move(seed, SCALE - RATE * (above - below) / (2 * SCALE))
        return (above + below) / 2

    return Local(evaluate, problem.device, lambda value: {"value": value})
