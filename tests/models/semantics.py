"""Derivatives that are replaced, mutation, views, structures: what a model's code may do."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.models.checking import Problem
from tests.models.registry import problem, r


class _Round(torch.autograd.Function):
    """A straight-through estimator: rounds forwards, passes the gradient backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Reverse(torch.autograd.Function):
    """Gradient reversal with a strength."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


class _Cube(torch.autograd.Function):
    """A Function whose saved input makes its backward non-linear in the point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x**3 * y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return 3 * x**2 * y * gradient, x**3 * gradient


@problem
def straight_through() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(_Round.apply(self.encode(x) * 3) / 3).tanh()

    return Problem(Model(), (r(4, 3),))


@problem
def gradient_reversal() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.label, self.domain = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.features(x).tanh()
            return self.label(h), self.domain(_Reverse.apply(h, 0.7)).tanh()

    return Problem(Model(), (r(4, 3),))


@problem
def custom_function_of_two_arguments() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return _Cube.apply(self.a(x), self.b(x).sigmoid())

    return Problem(Model(), (r(4, 3),))


@problem
def in_place_and_views() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x).tanh_().mul(2)
            y[:, 0] *= 2
            rows = y.view(-1, 3, 2).transpose(1, 2)
            rows[0].mul_(2).add_(rows[1].clone().sin())
            F.leaky_relu_(y.add_(1), 0.1)
            out = torch.zeros(x.shape[0], 8, dtype=x.dtype)
            out[:, 1:7] = y
            out[x[:, 0] > 0, 7] = y[0, 1].clone() ** 2
            out.diagonal().copy_(y.diagonal().clone() ** 3)
            out[:, 2:4].clamp_(-0.5, 0.5)
            y = y * 1.5
            y.fill_(0)
            out += y.sum()
            return out.index_fill(0, torch.tensor([1]), 0.5)

    return Problem(Model(), (r(3, 4),))


@dataclass
class Prediction:
    """An output as a dataclass."""

    logits: Tensor
    extra: dict[str, Any]


pytree.register_dataclass(Prediction)
Pair = namedtuple("Pair", "left right")  # noqa: PYI024  what users' code has


@problem
def structured_output() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, batch: dict[str, Tensor], *, scale: float, shift: Tensor | None = None) -> Prediction:
            h = (self.a(batch["x"]) * scale).sin()
            pair = Pair(self.b(h) + (0 if shift is None else shift), h)
            return Prediction(pair.left, {"pair": pair, "classes": pair.left.argmax(-1), "scale": scale, "none": None})

    return Problem(Model(), ({"x": r(2, 3)},), {"scale": 1.5, "shift": r(2)})


@problem
def checkpointed() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            from torch.utils.checkpoint import checkpoint

            h = checkpoint(lambda v: self.first(v).tanh(), x, use_reentrant=False)
            return checkpoint(lambda v: self.second(v).sigmoid(), h, use_reentrant=True)

    return Problem(Model(), (r(3, 3),), truth="difference", tolerance=1e-5)
