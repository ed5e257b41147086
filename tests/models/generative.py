"""Generative models: flows, autoencoders, discrete codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.checking import Problem
from tests.models.registry import problem, r


@problem
def normalising_flow() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4) + torch.randn(4, 4) / 4)
            self.lower, self.coupling = nn.Parameter(torch.randn(4, 4)), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            scale, shift = self.coupling(x[:, :2]).chunk(2, -1)
            scale = scale.tanh()
            x = torch.cat([x[:, :2], x[:, 2:] * scale.exp() + shift], -1)
            triangular = self.lower.tril(-1) + torch.eye(4, dtype=x.dtype)
            x = torch.linalg.solve_triangular(triangular, (x @ self.weight.T).T, upper=False, unitriangular=True).T
            return -x.square().sum(-1) / 2 + torch.linalg.slogdet(self.weight).logabsdet + scale.sum(-1)

    return Problem(Model(), (r(5, 4),))


@problem
def variational_autoencoder() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(5, 4), nn.Linear(2, 5)

        def forward(self, x: Tensor, *, noise: Tensor) -> dict[str, Tensor]:
            mean, log_variance = self.encode(x).chunk(2, -1)
            z = mean + noise * (log_variance / 2).exp()
            return {"logits": self.decode(z), "mean": mean, "log_variance": log_variance}

    def elbo(output: dict[str, Tensor], x: Tensor) -> Tensor:
        q = torch.distributions.Normal(output["mean"], (output["log_variance"] / 2).exp())
        prior = torch.distributions.Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean))
        rebuilt = F.binary_cross_entropy_with_logits(output["logits"], x, reduction="none").sum(-1)
        return (rebuilt + torch.distributions.kl_divergence(q, prior).sum(-1)).mean()

    x = torch.rand(3, 5, dtype=torch.float64)
    return Problem(Model(), (x,), {"noise": r(3, 2)}, loss=elbo, targets=(x,))


@problem
def vector_quantisation() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.codes, self.decode = nn.Linear(3, 4), nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.encode(x)
            nearest = (z.unsqueeze(1) - self.codes.weight).square().sum(-1).argmin(-1)
            q = self.codes(nearest)
            penalty = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
            return self.decode(z + (q - z).detach()).tanh(), penalty

    return Problem(Model(), (r(6, 3),))
