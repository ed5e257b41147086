"""Weights that are made from others: low-rank updates, hyper-networks, parametrisations, masks, quantisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.models.checking import Problem
from tests.models.registry import problem, r


class LowRank(nn.Module):
    """A frozen layer plus an update of rank two."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 0.5 * self.up(self.down(x))


@problem
def low_rank_adaptation() -> Problem:
    return Problem(nn.Sequential(LowRank(nn.Linear(4, 6)), nn.GELU(), LowRank(nn.Linear(6, 3))), (r(5, 4),))


@problem
def hyper_network() -> Problem:
    class Model(nn.Module):
        """A network whose output are the weights of another one, for each sample its own."""

        def __init__(self) -> None:
            super().__init__()
            self.make = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4 * 3 + 4))

        def forward(self, task: Tensor, x: Tensor) -> Tensor:
            weight, bias = self.make(task).split([12, 4], -1)
            one = torch.vmap(lambda x, w, b: F.linear(x, w.view(4, 3), b).sin())
            grouped = F.conv1d(x.mean(1).view(1, -1, 1), weight.reshape(-1, 3, 1), groups=x.shape[0])
            return one(x, weight, bias).sum(1) + grouped.view(x.shape[0], 4)

    return Problem(Model(), (r(3, 2), r(3, 5, 3)))


@problem
def parametrised_weights() -> Problem:
    class Symmetric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.triu() + x.triu(1).mT

    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.softplus(x)

    orthogonal = parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley")
    exponential = parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="matrix_exp")
    symmetric = parametrize.register_parametrization(nn.Linear(4, 4), "weight", Symmetric())
    parametrize.register_parametrization(symmetric, "bias", Positive())
    return Problem(nn.Sequential(orthogonal, nn.Tanh(), exponential, nn.Softsign(), symmetric), (r(3, 4),))


@problem
def orthogonal_by_householder() -> Problem:
    layer = parametrizations.orthogonal(nn.Linear(3, 4), orthogonal_map="householder")
    return Problem(nn.Sequential(layer, nn.Tanh()), (r(3, 3),))


@problem
def pruned_weights() -> Problem:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()  # plain attributes stay as they are
    with torch.no_grad():  # so that the product of weight and mask is a plain attribute until the first call
        prune.l1_unstructured(model[0], "weight", amount=0.4)
        prune.ln_structured(model[2], "weight", amount=2, n=2, dim=1)
    return Problem(model, (r(5, 4),))


@problem
def quantisation_aware_training() -> Problem:
    class Model(nn.Module):
        """Fake quantisation of weights (by channel) and activations, and with a learned step size."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
            self.scale = nn.Parameter(torch.tensor(0.05))

        def forward(self, x: Tensor) -> Tensor:
            scales = self.first.weight.detach().abs().amax(1).float() / 7
            zeros = torch.zeros(5, dtype=torch.int32)
            weight = torch.fake_quantize_per_channel_affine(self.first.weight, scales, zeros, 0, -8, 7)
            h = torch.fake_quantize_per_tensor_affine(F.linear(x, weight, self.first.bias), 0.1, 3, -20, 20).tanh()
            steps = self.second.weight / self.scale
            clipped = steps.clamp(-8, 7)
            learned = (clipped + (clipped.round() - clipped).detach()) * self.scale
            return F.linear(h, learned, self.second.bias)

    return Problem(Model(), (r(6, 4),))


@problem
def frozen_features_with_a_bottleneck() -> Problem:
    class Model(nn.Module):
        """Adapters, prefixes and scales in an attention layer whose own weights stay: as fine-tuning does."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True).requires_grad_(False)
            self.prefix, self.scale = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.ones(4))
            self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            keys = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1)
            h = self.attention(x, keys, keys * self.scale, need_weights=False)[0]
            return h + self.up(F.relu(self.down(h)))

    return Problem(Model(), (r(2, 3, 4),))
