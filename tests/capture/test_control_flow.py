"""Control flow in modules: branches and loops that use parameters, with operators after them, against differences."""

import pytest
import torch
from torch import nn
from torch._higher_order_ops import scan
from torch._higher_order_ops.map import map as higher_order_map
from torch._higher_order_ops.while_loop import while_loop

from tests.models.checking import Problem, check


class Model(nn.Module):
    """``flow(layer, x)`` between a layer and a projection that squares; both layers require gradients."""

    def __init__(self, flow):
        super().__init__()
        self.flow, self.before, self.inside = flow, nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.flow(self.inside, self.before(x))


def branch(layer, x):
    return torch.cond(x.sum() > 0, lambda x: layer(x).tanh(), lambda x: layer(x).sin() * x, (x,))


def loop(layer, x):
    return while_loop(lambda i, c: i < 3, lambda i, c: (i + 1, layer(c).tanh()), (torch.tensor(0), x))[1]


def recurrence(layer, x):
    def step(carry, row):
        new = layer(carry + row).tanh()
        return new, new * row

    return scan(step, torch.zeros(3, dtype=x.dtype), x)[1]


def each(layer, x):
    return higher_order_map(lambda row: layer(row).tanh() * row, x)


def fixed_point(layer, x):
    def iterate(z, change):
        after = torch.tanh(layer(z) / 3 + x)
        return after, (after - z).detach().abs().amax()

    start = (torch.zeros_like(x), torch.ones((), dtype=x.dtype))
    return while_loop(lambda z, change: change > 1e-12, iterate, start)[0]


@pytest.mark.parametrize("wrt", ["parameters", "inputs"])
@pytest.mark.parametrize("flow", [branch, loop, recurrence, each, fixed_point])
def test_in_a_module(flow, wrt):
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64)
    check(Problem(Model(flow).double(), (x,), wrt=wrt, truth="difference", tolerance=1e-5))


def test_pytorch_keeps_its_own_autograd_afterwards():
    model, x = Model(branch).double(), torch.randn(4, 3, dtype=torch.float64)
    check(Problem(model, (x,), truth="difference", tolerance=1e-5))
    assert model(x).requires_grad
    model(x).sum().backward()
    assert model.inside.weight.grad.abs().sum() > 0
