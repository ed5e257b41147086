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
