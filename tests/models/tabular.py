"""Models of tables: sparse features by embeddings, interactions, attention over columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.checking import Problem
from tests.models.registry import problem, r


@problem
def recommendation_with_bags() -> Problem:
    class Model(nn.Module):
        """Bags of features (sum, weighted sum, mean, max), dot products of all pairs, two perceptrons (DLRM)."""

        def __init__(self) -> None:
            super().__init__()
            self.bags = nn.ModuleList(nn.EmbeddingBag(7, 3, mode=m) for m in ("sum", "sum", "mean", "max"))
            self.bottom, self.top = nn.Linear(4, 3), nn.Linear(13, 1)

        def forward(self, dense: Tensor, index: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
            weights = [None, weight, None, None]
            features = [bag(index, offsets, w) for bag, w in zip(self.bags, weights, strict=True)]
            x = torch.stack([self.bottom(dense).relu(), *features], 1)
            row, column = torch.tril_indices(5, 5, -1)
            pairs = torch.bmm(x, x.transpose(1, 2))[:, row, column]
            return self.top(torch.cat([x[:, 0], pairs], 1)).sigmoid().squeeze(-1)

    args = (r(3, 4), torch.tensor([0, 2, 2, 5, 6, 1, 3]), torch.tensor([0, 3, 5]), r(7))
    # reverse mode has no second derivative of embedding_bag with weights for each sample
    loss, y = F.binary_cross_entropy, torch.tensor([1.0, 0, 1], dtype=torch.float64)
    return Problem(Model(), args, loss=loss, targets=(y,), truth="difference", tolerance=1e-5)


@problem
def factorisation_machine() -> Problem:
    class Model(nn.Module):
        """DeepFM: linear terms, all products of pairs by (square of the sum - sum of the squares) / 2, a perceptron."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.factors = nn.Embedding(9, 1), nn.Embedding(9, 3)
            self.deep = nn.Sequential(nn.Linear(9, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1))
            self.register_buffer("offset", torch.tensor([0, 3, 6]))

        def forward(self, fields: Tensor) -> Tensor:
            at = fields + self.offset
            v = self.factors(at)
            pairs = (v.sum(1).square() - v.square().sum(1)).sum(-1, keepdim=True) / 2
            return (self.linear(at).sum(1) + pairs + self.deep(v.flatten(1))).squeeze(-1)

    fields = torch.tensor([[0, 1, 2], [2, 2, 0], [1, 0, 1], [0, 1, 1]])
    y = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)
    return Problem(Model().train(), (fields,), loss=F.binary_cross_entropy_with_logits, targets=(y,))


@problem
def tabular_transformer() -> Problem:
    class Model(nn.Module):
        """Columns as tokens: one embedding for each category, one line for each number, a token for the answer."""

        def __init__(self) -> None:
            super().__init__()
            self.categories, self.slope, self.start = (
                nn.Embedding(6, 4),
                nn.Parameter(torch.randn(2, 4)),
                nn.Parameter(r(4)),
            )
            self.encoder = nn.TransformerEncoderLayer(4, 2, 6, 0.0, F.gelu, batch_first=True, norm_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, category: Tensor, number: Tensor) -> Tensor:
            tokens = [
                self.start.expand(number.shape[0], 1, -1),
                self.categories(category),
                number.unsqueeze(-1) * self.slope,
            ]
            return self.head(self.encoder(torch.cat(tokens, 1))[:, 0])

    args = (torch.tensor([[0, 4], [2, 5], [1, 3]]), r(3, 2))
    return Problem(Model().train(), args, loss=F.cross_entropy, targets=(torch.tensor([1, 0, 1]),))


@problem
def soft_decision_trees() -> Problem:
    class Model(nn.Module):
        """Two trees of depth two with sparse choices of features; what a sample gets is a product of its turns."""

        def __init__(self) -> None:
            super().__init__()
            self.choice, self.threshold = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(2, 3))
            self.leaves, self.hinge = nn.Parameter(torch.randn(2, 4, 2)), nn.Parameter(torch.randn(4))

        @staticmethod
        def sparsemax(x: Tensor) -> Tensor:
            ordered = x.sort(-1, descending=True).values
            total = ordered.cumsum(-1) - 1
            count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
            support = (ordered * count > total).sum(-1, keepdim=True)
            return (x - total.gather(-1, support - 1) / support).clamp(min=0)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.maximum(x, self.hinge)
            go = torch.sigmoid(torch.einsum("bf,tnf->btn", x, self.sparsemax(self.choice)) - self.threshold)
            top, left, right = go.unbind(-1)
            reach = [top * left, top * (1 - left), (1 - top) * right, (1 - top) * (1 - right)]
            return torch.einsum("btl,tlo->bo", torch.stack(reach, -1), self.leaves)

    return Problem(Model(), (r(5, 4),))
