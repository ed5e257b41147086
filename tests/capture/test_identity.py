"""A model tells its parameters apart by identity, wherever it keeps them, and gives them to function transforms."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, functionalize, grad, jvp, vmap

import fomoh_fx

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


class Model(nn.Module):
    """``compute`` gives the loss; ``keep`` is what the model has beside its layer."""

    def __init__(self, compute, keep=lambda layer: None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3).double()
        self.register_buffer("shift", torch.full((3,), 0.5, dtype=torch.float64))
        self.compute, self.kept = compute, keep(self.layer)

    def forward(self, x):
        return self.compute(self, (self.layer(x) + self.shift).tanh().sum(), x)


def check(model):
    """Against reverse-over-reverse in the model's own parameters: with others, it would find none of those it keeps."""
    parameters = dict(model.named_parameters())
    tangents = {name: torch.randn(2, *p.shape, dtype=p.dtype) for name, p in parameters.items()}
    out = fomoh_fx.transform(model)(X, tangents=tangents)
    loss = model(X)
    leaves = [*parameters.values()]
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    torch.testing.assert_close(out.primal, loss.detach())
    for i in range(2):
        slope = sum((g * tangents[name][i]).sum() for g, name in zip(gradients, parameters, strict=True))
        second = torch.autograd.grad(slope, leaves, retain_graph=True)
        torch.testing.assert_close(out.tangent[i], slope.detach())
        for j in range(2):
            value = sum((h * tangents[name][j]).sum() for h, name in zip(second, parameters, strict=True))
            torch.testing.assert_close(out.hessian()[i, j], value)


def penalised(model, y, x):
    """No weight decay for what is in a list."""
    without = {id(p) for p in model.kept}
    return y + sum(p.pow(4).sum() for p in model.parameters() if id(p) not in without)


COMPARED = {
    "identity in a list": (penalised, lambda layer: [layer.bias]),
    "membership of a set": (
        lambda model, y, x: y * (3 if model.layer.weight in model.kept else 1),
        lambda layer: {layer.weight},
    ),
    "keys of a dictionary": (
        lambda model, y, x: y + sum(model.kept[p] * p.pow(4).sum() for p in model.parameters()),
        lambda layer: {layer.bias: 5.0, layer.weight: 2.0},
    ),
    "the groups of an optimizer": (
        lambda model, y, x: y + sum(g["lr"] * p.pow(3).sum() for g in model.kept.param_groups for p in g["params"]
                                    if p is model.layer.bias),
        lambda layer: torch.optim.SGD(layer.parameters(), lr=0.1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARED)
def test_a_parameter_is_itself_wherever_it_is_kept(name):
    check(Model(*COMPARED[name]))


def test_a_buffer_is_itself_wherever_it_is_kept():
    model = Model(lambda model, y, x: y * (3 if model.kept[0] is model.shift else 1))
    model.kept = (model.shift,)
    check(model)


def adapted(model, y, x):
    """After one step of gradient descent."""
    own = dict(model.layer.named_parameters())
    slopes = grad(lambda p: functional_call(model.layer, p, (x,)).square().sum())(own)
    return functional_call(model.layer, {name: p - 0.1 * slopes[name] for name, p in own.items()}, (x,)).pow(3).sum()


def changed(weight):
    return weight.clone().mul_(2) + weight


ENTERED = {
    "functional_call inside grad": adapted,
    "grad": lambda model, y, x: y * grad(lambda w: w.pow(3).sum())(model.layer.bias).sum(),
    "grad of one that is kept": lambda model, y, x: y * grad(lambda w: w.pow(3).sum())(model.kept[0]).sum(),
    "vmap": lambda model, y, x: y + vmap(lambda w: w.prod())(model.layer.weight).sum(),
    "jvp": lambda model, y, x: y + jvp(lambda w: w.pow(3).sum(), (model.layer.bias,), (model.shift,))[1],
    "functionalize": lambda model, y, x: y + functionalize(changed)(model.layer.weight).square().sum(),
    "another Parameter": lambda model, y, x: y * (nn.Parameter(model.layer.bias) * x).sum(),
    "another Parameter by keyword": lambda model, y, x: y * (nn.Parameter(data=model.layer.bias) * x).sum(),
}


@pytest.mark.parametrize("name", ENTERED)
def test_a_parameter_enters_what_is_no_torch_function(name):
    check(Model(ENTERED[name], lambda layer: [layer.bias]))
