"""Small problems whose derivatives and minima are known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fomoh_fx
from fomoh_fx.low_rank import dense
from fomoh_fx.optim import FGD, FoMoH, FoMoHKD
from fomoh_fx.optim.directions import Batch
from fomoh_fx.optim.groups import trained
from fomoh_fx.optim.samplers import Proposed

ALL = (FGD, FoMoH, FoMoHKD)


class Quadratic(nn.Module):
    """1/2 theta^T A theta - b^T theta with theta in two parameters, x [2] and y [3]; A is positive definite."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(5, 5, dtype=torch.float64, generator=generator)
        self.a, self.b = root @ root.T + torch.eye(5, dtype=torch.float64), root[0]
        self.x = nn.Parameter(torch.randn(2, dtype=torch.float64, generator=generator))
        self.y = nn.Parameter(torch.randn(3, dtype=torch.float64, generator=generator))

    @property
    def theta(self) -> Tensor:
        return torch.cat([self.x, self.y])

    def forward(self) -> Tensor:
        return self.theta @ self.a @ self.theta / 2 - self.b @ self.theta

    def gradient(self) -> Tensor:
        return (self.a @ self.theta - self.b).detach()


class Rosenbrock(nn.Module):
    """(1 - x)^2 + 100 (y - x^2)^2."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.at = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        x, y = self.at[0], self.at[1]
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def classifier(curvature: str = "hessian", dtype: torch.dtype = torch.float64):
    """An MLP and a batch: hd, x, targets."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    x = torch.randn(20, 4, generator=generator).to(dtype)
    y = torch.randint(0, 3, (20,), generator=generator)
    return fomoh_fx.transform(model, nn.functional.cross_entropy, curvature=curvature), x, (y,)


def flat(stacks: Proposed) -> Tensor:
    """[K, n]: the directions as rows."""
    return torch.cat([dense(v).reshape(v.shape[0], -1) for v in stacks.values()], 1)


def parameters_of(module: nn.Module) -> Tensor:
    """All parameters in one copy."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).clone()


def next_directions(opt) -> dict[str, Tensor]:
    """The directions that the next step will take."""
    state = opt.directions.state_dict()
    drawn = opt.directions.propose(trained(opt.param_groups), Batch((), {}, None))
    opt.directions.load_state_dict(state)
    return drawn
