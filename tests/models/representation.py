"""Learning of representations: several towers, stopped targets, moving averages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.checking import Problem
from tests.models.registry import problem, r


@problem
def shared_modules() -> Problem:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
            self.same = self.tower

        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return F.triplet_margin_loss(self.tower(a), self.same(b), self.tower(c), margin=5.0, reduction="none")

    return Problem(Siamese(), (r(3, 4), r(3, 4), r(3, 4)))


@problem
def self_supervision_with_stops() -> Problem:
    class Model(nn.Module):
        """An online and a slowly moving network; variance and covariance terms as in VICReg."""

        def __init__(self) -> None:
            super().__init__()
            self.online, self.slow = nn.Linear(4, 3), nn.Linear(4, 3)
            self.predict = nn.Linear(3, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                target = F.normalize(self.slow(y).tanh(), dim=-1)
            z = self.online(x)
            similarity = (F.normalize(self.predict(z), dim=-1) * target).sum(-1).mean()
            variance = F.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean()
            centred = z - z.mean(0)
            covariance = (centred.T @ centred) / (x.shape[0] - 1)
            off = covariance.flatten()[:-1].view(2, 4)[:, 1:].square().sum()
            scale = z.data.std()
            return -similarity + variance + off / scale

    return Problem(Model(), (r(5, 4), r(5, 4)))


@problem
def moving_average_buffer() -> Problem:
    class Model(nn.Module):
        """Centres its output by an exponential moving average that it updates in place, as DINO does."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.register_buffer("centre", torch.zeros(4))
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            with torch.no_grad():
                self.centre.mul_(0.9).add_(y.mean(0), alpha=0.1)
                self.calls += 1
            return (y - self.centre).log_softmax(-1)

    return Problem(Model(), (r(5, 3),))
