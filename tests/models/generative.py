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


@problem
def adversarial_losses() -> Problem:
    class Model(nn.Module):
        """A generator, a critic, the hinge losses of both, and a gradient penalty at points between."""

        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Sequential(
                nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Softplus(), nn.Linear(4, 3), nn.Tanh()
            )
            self.critic = nn.Sequential(nn.Linear(3, 5), nn.LeakyReLU(0.2), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1))

        def forward(self, x: Tensor, z: Tensor, between: Tensor) -> tuple[Tensor, Tensor]:
            fake = self.generator(z)
            hinge = F.relu(1 - self.critic(x)).mean() + F.relu(1 + self.critic(fake.detach())).mean()
            mixed = (between * x + (1 - between) * fake.detach()).requires_grad_()
            (slope,) = torch.autograd.grad(self.critic(mixed).sum(), mixed, create_graph=True)
            penalty = (slope.norm(2, 1) - 1).square().mean()
            return -self.critic(fake).mean(), hinge + 10 * penalty

    return Problem(Model().train(), (r(4, 3), r(4, 2), torch.rand(4, 1, dtype=torch.float64)))


@problem
def mixture_density() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.weights = nn.Linear(2, 5), nn.Linear(5, 3)
            self.means, self.scales = nn.Linear(5, 6), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = self.body(x).tanh()
            return (
                self.weights(h),
                self.means(h).unflatten(-1, (3, 2)),
                F.softplus(self.scales(h)).unflatten(-1, (3, 2)),
            )

    def unlikely(output: tuple[Tensor, Tensor, Tensor], y: Tensor) -> Tensor:
        logits, mean, scale = output
        parts = torch.distributions.Independent(torch.distributions.Normal(mean, scale), 1)
        mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logits), parts)
        return -mixture.log_prob(y).mean()

    return Problem(Model(), (r(4, 2),), loss=unlikely, targets=(r(4, 2),))


@problem
def reparameterised_samples() -> Problem:
    class Model(nn.Module):
        """Draws with derivatives: Normal, Laplace, Gumbel softmax (also straight-through), Logistic by its inverse."""

        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(3, 10), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mean, spread, logits = self.encode(x).split([2, 2, 6], -1)
            scale = F.softplus(spread)
            a = torch.distributions.Normal(mean, scale).rsample()
            b = torch.distributions.Laplace(mean, scale).rsample()
            hard = F.gumbel_softmax(logits[:, :3], tau=0.7, hard=True)
            soft = F.gumbel_softmax(logits[:, 3:], tau=0.7)
            uniform = torch.rand_like(mean[:, :1])
            c = mean[:, :1] + scale[:, :1] * (uniform.log() - (-uniform).log1p())
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            return self.decode(torch.cat([a, b, hard + soft, c], -1)), entropy

    return Problem(Model(), (r(4, 3),))


@problem
def flow_of_couplings() -> Problem:
    class Coupling(nn.Module):
        """A rational-quadratic spline of one half, whose knots come from the other half."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = nn.Linear(1, 11), nn.Parameter(torch.randn(2) / 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x * self.scale.exp()
            widths, heights, slopes = self.net(x[:, :1]).split([4, 4, 3], -1)
            edges = [F.pad(w.softmax(-1).cumsum(-1), (1, 0)) * 6 - 3 for w in (widths, heights)]
            slopes = F.pad(F.softplus(slopes), (1, 1), value=1.0)
            y = x[:, 1:].clamp(-2.9, 2.9)
            bin = torch.searchsorted(edges[0].detach()[:, 1:-1].contiguous(), y.detach())
            left, right, low, high = (e.gather(1, bin + i) for e in edges for i in (0, 1))
            rise = (high - low) / (right - left)
            s, before, after = (y - left) / (right - left), slopes.gather(1, bin), slopes.gather(1, bin + 1)
            below = rise + (before + after - 2 * rise) * s * (1 - s)
            out = low + (high - low) * (rise * s.square() + before * s * (1 - s)) / below
            density = after * s.square() + 2 * rise * s * (1 - s) + before * (1 - s).square()
            log_slope = (rise.square() * density).log() - 2 * below.log() + self.scale.sum()
            return torch.cat([x[:, :1], out], -1).flip(-1), log_slope.squeeze(-1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Coupling() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros_like(x[:, 0])
            for layer in self.layers:
                x, log_slope = layer(x)
                total = total + log_slope
            return -x.square().sum(-1) / 2 + total

    return Problem(Model(), (r(4, 2),))


@problem
def masked_autoregressive_density() -> Problem:
    class Masked(nn.Linear):
        def __init__(self, mask: Tensor) -> None:
            super().__init__(mask.shape[1], mask.shape[0])
            self.register_buffer("mask", mask)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.mask, self.bias)

    order, hidden = torch.arange(3), torch.tensor([0, 1, 0, 1])
    model = nn.Sequential(
        Masked((hidden[:, None] >= order).double()), nn.ELU(), Masked((order.repeat(2)[:, None] > hidden).double())
    )

    def unlikely(output: Tensor, x: Tensor) -> Tensor:
        shift, log_scale = output.chunk(2, -1)
        return (((x - shift) * (-log_scale).exp()).square() / 2 + log_scale).sum(-1).mean()

    x = r(4, 3)
    return Problem(model, (x,), loss=unlikely, targets=(x,))


@problem
def denoising_diffusion() -> Problem:
    class Model(nn.Module):
        """Predicts the noise at random times, with sinusoidal embeddings of time that scale and shift the features."""

        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 8))
            self.first, self.last, self.norm = (
                nn.Conv1d(2, 4, 3, padding=1),
                nn.Conv1d(4, 2, 3, padding=1),
                nn.GroupNorm(2, 4),
            )
            self.register_buffer("kept", torch.cumprod(1 - torch.linspace(1e-2, 0.3, 10, dtype=torch.float64), 0))

        def forward(self, x: Tensor) -> Tensor:
            t, noise = torch.randint(10, (x.shape[0],)), torch.randn_like(x)
            kept = self.kept[t].view(-1, 1, 1)
            noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
            angles = t.unsqueeze(-1) * torch.tensor([1.0, 0.1], dtype=x.dtype)
            scale, shift = self.time(torch.cat([angles.sin(), angles.cos()], -1)).unsqueeze(-1).chunk(2, 1)
            predicted = self.last(F.silu(self.norm(self.first(noisy)) * (1 + scale) + shift))
            return F.mse_loss(predicted, noise, reduction="none").mean((1, 2))

    return Problem(Model(), (r(3, 2, 5),))
