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


@problem
def contrastive_pairs() -> Problem:
    class Model(nn.Module):
        """SimCLR: two views of each sample attract, all others repel (NT-Xent); a learned temperature as in CLIP."""

        def __init__(self) -> None:
            super().__init__()
            self.tower, self.project = nn.Linear(4, 5), nn.Linear(5, 3)
            self.log_scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            z = F.normalize(self.project(self.tower(torch.cat([a, b])).relu()), dim=-1)
            similarity = self.log_scale.exp().clamp(max=100) * z @ z.T
            similarity = similarity.masked_fill(torch.eye(z.shape[0], dtype=torch.bool), float("-inf"))
            n = a.shape[0]
            partner = torch.cat([torch.arange(n) + n, torch.arange(n)])
            return F.cross_entropy(similarity, partner) + F.cosine_embedding_loss(
                z[:n], z[n:], torch.tensor([1, -1, 1])
            )

    return Problem(Model(), (r(3, 4), r(3, 4)))


@problem
def supervised_contrast_with_margins() -> Problem:
    class Model(nn.Module):
        """The hardest triplets of a batch, and an angular margin on the classes' own directions (ArcFace)."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.classes = nn.Linear(4, 3), nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            z = F.normalize(self.embed(x).tanh(), dim=-1)
            apart = (2 - 2 * z @ z.T).clamp(min=1e-12).sqrt()
            same = y[:, None] == y
            farthest = apart.masked_fill(~same | torch.eye(len(y), dtype=torch.bool), -torch.inf).amax(1)
            nearest = apart.masked_fill(same, torch.inf).amin(1)
            cosine = z @ F.normalize(self.classes, dim=-1).T
            angle = torch.acos(cosine.clamp(-1 + 1e-7, 1 - 1e-7))
            logits = 4 * torch.where(F.one_hot(y, 2).bool(), (angle + 0.3).cos(), cosine)
            return F.relu(farthest - nearest + 0.5).mean(), F.cross_entropy(logits, y)

    return Problem(Model(), (r(4, 4), torch.tensor([0, 1, 0, 1])))


@problem
def distillation() -> Problem:
    class Model(nn.Module):
        """A student, a frozen teacher, the divergence of softened outputs and of the statistics of features."""

        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher, self.head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 5)
            self.teacher.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            h, goal = self.student(x).tanh(), self.teacher(x).tanh().detach()
            told, taught = (self.head(h) / 2).log_softmax(-1), (self.head(goal) / 2).log_softmax(-1).detach()
            soft = F.kl_div(told, taught, reduction="batchmean", log_target=True)
            correlation = torch.corrcoef(torch.cat([h, goal], 1).T)[:3, 3:]
            kernel = torch.exp(
                -torch.cat([h, goal]).unsqueeze(0).sub(torch.cat([h, goal]).unsqueeze(1)).square().sum(-1)
            )
            return soft - correlation.diagonal().sum() + kernel.mean()

    return Problem(Model(), (r(5, 4),))
