"""Models whose graph depends on their data, or whose tensors are not strided: refused, with the line that is why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fomoh_fx
from fomoh_fx.errors import CaptureError, FomohError, UnsupportedOpError


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)


class Matching(Layer):
    """Set prediction as in DETR: each truth takes one box, by the Hungarian method on detached costs."""

    def forward(self, x: Tensor, truth: Tensor) -> Tensor:
        optimize = pytest.importorskip("scipy.optimize")
        boxes = self.layer(x)
        cost = torch.cdist(boxes, truth, p=1).detach()
        rows, columns = optimize.linear_sum_assignment(cost.numpy())  # the line
        return F.l1_loss(boxes[torch.as_tensor(rows)], truth[torch.as_tensor(columns)])


class Equilibrium(Layer):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(50):
            after = torch.tanh(self.layer(z) / 3 + x)
            if (after - z).abs().max() < 1e-8:  # the line
                break
            z = after
        return z.sum()


class AdaptiveTime(Layer):
    def forward(self, x: Tensor) -> Tensor:
        total, out = x.new_zeros(x.shape[0]), torch.zeros_like(x)
        while (total < 0.99).any():  # the line
            x = self.layer(x).tanh()
            p = torch.minimum(x.sigmoid().mean(-1), 1 - total)
            total, out = total + p, out + p.unsqueeze(-1) * x
        return out.sum()


class SkippedExperts(Layer):
    def forward(self, x: Tensor) -> Tensor:
        chosen = self.layer(x)[:, 0] > 0
        if chosen.any():  # the line
            return self.layer(x[chosen]).sum()
        return x.sum()


class Jagged(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = torch.nested.nested_tensor([x, y], layout=torch.jagged)  # the line
        return torch.nested.to_padded_tensor(self.layer(both), 0.0).sum()


class SparseWeight(Layer):
    def forward(self, x: Tensor) -> Tensor:
        index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        weight = torch.sparse_coo_tensor(index, self.layer.bias, (3, 3))  # the line
        return torch.sparse.mm(weight, x.T).square().sum()


class SparseGraph(Layer):
    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        return torch.sparse.mm(graph, self.layer(x)).square().sum()


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


REFUSED = {
    Matching: ((r(4, 3), r(2, 3)), CaptureError),
    Equilibrium: ((r(2, 3),), CaptureError),
    AdaptiveTime: ((r(2, 3),), CaptureError),
    SkippedExperts: ((r(4, 3),), CaptureError),
    Jagged: ((r(2, 3), r(4, 3)), CaptureError),
    SparseWeight: ((r(4, 3),), UnsupportedOpError),
    SparseGraph: ((r(3, 3), torch.eye(3).to_sparse()), UnsupportedOpError),
}


def refusal(model: nn.Module, args: tuple[Tensor, ...], error: type[FomohError]) -> str:
    tangents = {name: torch.randn(2, *p.shape) for name, p in model.named_parameters()}
    with pytest.raises(error) as caught:
        fomoh_fx.transform(model)(*args, tangents=tangents)
    return str(caught.value)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_refused(kind: type[nn.Module]) -> None:
    message = refusal(kind(), *REFUSED[kind])
    if kind is SparseGraph:
        assert message.startswith("input graph is a sparse_coo tensor") and "index_add" in message
    else:
        assert "test_refusals.py:" in message and "# the line" in message, message
