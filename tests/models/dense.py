"""Dense models: perceptrons, gates, normalisations, mixtures of experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.checking import Problem
from tests.models.registry import problem, r


@problem
def mlp() -> Problem:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    return Problem(model, (r(4, 5),), loss=F.cross_entropy, targets=(torch.tensor([0, 2, 1, 1]),))


@problem
def logistic_regression() -> Problem:
    return Problem(nn.Linear(6, 4), (r(5, 6),), loss=F.cross_entropy, targets=(torch.tensor([0, 2, 1, 3, 1]),))


@problem
def residual_mlp_layer_norm() -> Problem:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(self.norm(x))))

    return Problem(nn.Sequential(Block(), Block(), nn.RMSNorm(6)), (r(3, 6),))


@problem
def gated_linear_units() -> Problem:
    class SwiGLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.value, self.out = (nn.Linear(a, b, bias=False) for a, b in ((4, 6), (4, 6), (6, 4)))

        def forward(self, x: Tensor) -> Tensor:
            return F.glu(torch.cat([self.out(F.silu(self.gate(x)) * self.value(x)), x], -1))

    return Problem(SwiGLU(), (r(5, 4),))


@problem
def batch_norm_without_running_statistics() -> Problem:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False, momentum=None))
    return Problem(model, (r(6, 3),))


@problem
def dropout() -> Problem:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 6), nn.SELU(), nn.AlphaDropout(0.3))
    return Problem(model.train(), (r(4, 5),))


@problem
def weight_and_spectral_norm() -> Problem:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3)),
    )  # fmt: skip
    # reverse mode is wrong here: weight_norm's backward takes the norm that it saved as a constant
    return Problem(model.eval(), (r(3, 4),), truth="difference", tolerance=1e-5)


@problem
def mixture_of_experts() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 3)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.gate(x)
            best, which = scores.topk(2, -1)
            gates = torch.zeros_like(scores).scatter(-1, which, best.softmax(-1))
            outputs = torch.stack([expert(x) for expert in self.experts], 1)
            balance = (gates > 0).to(x.dtype).mean(0) @ scores.softmax(-1).mean(0)
            return (gates.unsqueeze(-1) * outputs).sum(1), balance

    return Problem(Model(), (r(5, 4),))


@problem
def unused_parameters() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(7, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).exp()

    return Problem(Model(), (r(3, 3),))


@problem
def parameter_containers() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(nn.Parameter(torch.randn(3, 3)) for _ in range(2))
            self.named = nn.ParameterDict(
                {"scale": nn.Parameter(torch.randn(3)), "scalar": nn.Parameter(torch.randn(()))}
            )
            self.bilinear = nn.Bilinear(3, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = x
            for weight in self.weights:
                y = (y @ weight).sigmoid() * self.named["scale"] + self.named["scalar"]
            return self.bilinear(x, y)

    return Problem(Model(), (r(4, 3),))


@problem
def experts_by_rows() -> Problem:
    class Model(nn.Module):
        """Each expert sees the tokens that chose it, as many as they are; its rows are added where they belong."""

        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 3, bias=False)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 4)) for _ in range(3))
            self.shared = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.gate(x).softmax(-1)
            weights, chosen = scores.topk(2, -1)
            weights = weights / weights.sum(-1, keepdim=True)
            chosen_by = F.one_hot(chosen, 3).permute(2, 1, 0)
            out = self.shared(x)
            for number, expert in enumerate(self.experts):
                place, token = torch.where(chosen_by[number])
                out = out.index_add(0, token, expert(x[token]) * weights[token, place].unsqueeze(-1))
            share = F.one_hot(chosen, 3).to(x.dtype).mean((0, 1))
            return out, 3 * (share * scores.mean(0)).sum() + 1e-3 * self.gate(x).logsumexp(-1).square().mean()

    return Problem(Model(), (r(5, 4),))
