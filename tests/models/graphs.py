"""Models of graphs and sets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.checking import Problem
from tests.models.registry import problem, r


class GraphNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message, self.update, self.out = nn.Linear(6, 5), nn.Linear(8, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, destination = edges
        messages = torch.tanh(self.message(torch.cat([x[source], x[destination]], -1)))
        summed = torch.zeros(x.shape[0], 5, dtype=x.dtype).index_add(0, destination, messages)
        x = F.silu(self.update(torch.cat([x, summed], -1)))
        score = self.out(x)[source]
        index = destination[:, None].expand_as(score)
        top = torch.full((x.shape[0], 2), -10.0, dtype=x.dtype).scatter_reduce(0, index, score, "amax")
        weight = (score - top[destination]).exp()
        total = torch.zeros_like(top).scatter_add(0, index, weight)
        return weight / total[destination]


@problem
def graph_network() -> Problem:
    return Problem(GraphNetwork(), (r(4, 3), torch.tensor([[0, 1, 2, 3, 0], [1, 2, 2, 0, 3]])))


def _edges() -> Tensor:
    return torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 2, 0, 3, 1]])


@problem
def graph_convolution() -> Problem:
    class Layer(nn.Module):
        """D^-1/2 (A + 1) D^-1/2 x W, by sums over edges."""

        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.linear, self.bias = nn.Linear(inputs, outputs, bias=False), nn.Parameter(torch.randn(outputs))

        def forward(self, x: Tensor, edges: Tensor, weight: Tensor) -> Tensor:
            loops = torch.arange(x.shape[0])
            source, destination = torch.cat([edges, torch.stack([loops, loops])], 1)
            weight = torch.cat([weight, weight.new_ones(x.shape[0])])
            degree = weight.new_zeros(x.shape[0]).index_add(0, destination, weight)
            norm = degree.rsqrt()
            messages = self.linear(x)[source] * (norm[source] * weight * norm[destination]).unsqueeze(-1)
            return torch.zeros_like(messages[: x.shape[0]]).index_add_(0, destination, messages) + self.bias

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Layer(3, 4), Layer(4, 2)
            self.weight = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            weight = F.softplus(self.weight)
            return self.second(F.relu(self.first(x, edges, weight)), edges, weight).log_softmax(-1)

    def of_labelled(log_probs: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
        return F.nll_loss(log_probs[labelled], labels[labelled])

    targets = (torch.tensor([0, 1, 1, 0]), torch.tensor([0, 2, 3]))
    return Problem(Model(), (r(4, 3), _edges()), loss=of_labelled, targets=targets)


@problem
def graph_attention() -> Problem:
    class Model(nn.Module):
        """Several heads, the softmax over the edges of each destination by segments; pooling of nodes by graph."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(3, 6, bias=False), nn.Linear(6, 2)
            self.source, self.destination = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
            source, destination = edges
            h = self.linear(x).unflatten(-1, (2, 3))
            score = (h * self.source).sum(-1)[source] + (h * self.destination).sum(-1)[destination]
            score = F.leaky_relu(score, 0.2)
            index = destination.unsqueeze(-1).expand_as(score)
            top = torch.zeros(x.shape[0], 2, dtype=x.dtype).scatter_reduce(0, index, score, "amax", include_self=False)
            weight = (score - top.gather(0, index)).exp()
            total = torch.zeros_like(top).scatter_add(0, index, weight)
            weight = weight / (total.index_select(0, destination) + 1e-16)
            h = torch.zeros_like(h).index_add(0, destination, weight.unsqueeze(-1) * h[source]).flatten(1)
            h = F.elu(h)
            pooled = [
                h.new_zeros(2, 6).scatter_reduce(0, graph.unsqueeze(-1).expand_as(h), h, how, include_self=False)
                for how in ("sum", "mean", "amin")
            ]  # fmt: skip
            return self.head(sum(pooled))

    return Problem(Model(), (r(4, 3), _edges(), torch.tensor([0, 0, 1, 1])))


@problem
def message_passing_in_coordinates() -> Problem:
    class Model(nn.Module):
        """An equivariant network: messages from squared distances move the coordinates along differences."""

        def __init__(self) -> None:
            super().__init__()
            self.edge = nn.Sequential(nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 4), nn.SiLU())
            self.move, self.node = nn.Linear(4, 1, bias=False), nn.Linear(6, 2)

        def forward(self, h: Tensor, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
            source, destination = edges
            for _ in range(2):
                step = x[source] - x[destination]
                square = step.square().sum(-1, keepdim=True)
                message = self.edge(torch.cat([h[source], h[destination], square], -1))
                x = x.index_add(0, destination, step / (square.sqrt() + 1) * self.move(message), alpha=0.5)
                total = torch.zeros(h.shape[0], 4, dtype=h.dtype).index_add(0, destination, message)
                h = h + self.node(torch.cat([h, total], -1))
            return h, x

    return Problem(Model(), (r(4, 2), r(4, 3), torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 3, 0, 3, 1]])))


@problem
def deep_sets() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 5), nn.Linear(15, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = self.inner(x).tanh()
            kept = mask.unsqueeze(-1)
            total = (h * kept).sum(1)
            largest = h.masked_fill(~kept, -torch.inf).max(1).values
            return self.outer(torch.cat([total, total / kept.sum(1), largest], -1))

    return Problem(Model(), (r(2, 4, 3), torch.tensor([[True] * 4, [True, True, False, False]])))


@problem
def point_net() -> Problem:
    class Model(nn.Module):
        """A learned transform of the points, shared layers, the largest over all points; neighbours by distance."""

        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU())
            self.matrix, self.shared, self.edge = nn.Linear(4, 9), nn.Conv1d(3, 5, 1), nn.Conv2d(10, 4, 1)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            turn = (self.matrix(self.turn(x).amax(-1)) + torch.eye(3, dtype=x.dtype).flatten()).view(-1, 3, 3)
            h = self.shared((x.transpose(1, 2) @ turn).transpose(1, 2)).relu()
            gram = h.transpose(1, 2) @ h
            squares = gram.diagonal(dim1=1, dim2=2)
            near = (2 * gram - squares.unsqueeze(1) - squares.unsqueeze(2)).topk(3, -1).indices
            around = h.unsqueeze(2).expand(-1, -1, h.shape[2], -1).gather(3, near.unsqueeze(1).expand(-1, 5, -1, -1))
            centre = h.unsqueeze(3).expand_as(around)
            h = self.edge(torch.cat([centre, around - centre], 1)).relu().max(-1)[0].max(-1)[0]
            penalty = torch.linalg.matrix_norm(turn @ turn.mT - torch.eye(3, dtype=x.dtype)).mean()
            return self.head(h), penalty

    return Problem(Model().train(), (r(2, 3, 5),))
