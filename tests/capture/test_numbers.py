"""Numbers that only the data decide, which a model keeps or returns; copies of its tensors, modules outside of it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fomoh_fx
from fomoh_fx.errors import CaptureError
from tests.oracle import reverse_over_reverse


class Keeping(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.linear = nn.Linear(2, 2).double()
        self.keep, self.mean, self.log, self.named = keep, 0.0, [], {}

    def forward(self, x):
        y = self.linear(x).tanh()
        self.keep(self, y.square().mean())
        return (y * (1 + self.mean)).sum()


def average(model, value):
    model.mean = 0.9 * model.mean + 0.1 * value.item()


def new(model, value):
    model.last = value.item()


def listed(model, value):
    model.log.append(value.item())


def named(model, value):
    model.named["loss"] = value.item()


def called(model):
    tangents = {name: torch.ones(1, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    return fomoh_fx.transform(model)(torch.ones(3, 2, dtype=torch.float64), tangents=tangents)


@pytest.mark.parametrize(("keep", "place"), [(average, "mean"), (new, "last"), (listed, "log"), (named, "named.loss")])
def test_kept(keep, place):
    """It would stay at its first value, or stand for it as a symbol."""
    model = Keeping(keep)
    with pytest.raises(CaptureError, match=rf"\.item\(\).*Keeping\.{place}.*\.detach\(\)"):
        called(model)
    assert (model.mean, model.log, model.named, hasattr(model, "last")) == (0.0, [], {}, False)


def test_kept_as_a_tensor():
    model = Keeping(lambda model, value: setattr(model, "last", value.detach()))
    called(model)
    torch.testing.assert_close(model.last, model.linear(torch.ones(3, 2).double()).tanh().square().mean().detach())


def test_returned():
    with pytest.raises(CaptureError, match=r"returns a number.*return the tensor"):
        fomoh_fx.transform(lambda x: (x.sin(), x.sum().item()), wrt="inputs")(
            torch.ones(3), tangents=(torch.ones(1, 3),)
        )


class Frozen(nn.Module):
    """Next to a copy of itself, as it is at each call: what is copied has no derivative."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2).double()

    def forward(self, x):
        target = copy.deepcopy(self.linear).requires_grad_(False)
        weight = copy.deepcopy(self.linear.weight)
        return F.mse_loss(self.linear(x), target(1.1 * x)) + (self.linear.weight * weight).sin().sum()


def test_deepcopy():
    torch.manual_seed(0)
    model = Frozen()
    x = torch.randn(3, 2, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    v = {name: torch.randn(2, *p.shape, dtype=p.dtype) for name, p in parameters.items()}

    def function(*values):  # the copy's numbers are those of the point
        given = {f"linear.{n}": value for n, value in zip(("weight", "bias"), values, strict=True)}
        weight, bias = (p.detach() for p in parameters.values())
        now = F.linear(x, given["linear.weight"], given["linear.bias"])
        return F.mse_loss(now, F.linear(1.1 * x, weight, bias)) + (given["linear.weight"] * weight).sin().sum()

    _, tangent, cross = reverse_over_reverse(function, list(parameters.values()), list(v.values()))
    out = fomoh_fx.transform(model)(x, tangents=v)
    torch.testing.assert_close(out.tangent, tangent)
    torch.testing.assert_close(out.hessian(), cross)


class Table:
    first = None


def test_an_attribute_of_a_class():
    """It would keep a tensor without data."""

    def function(x):
        if Table.first is None:
            Table.first = torch.arange(3.0)
        return (x * Table.first).sum()

    with pytest.raises(CaptureError, match="an attribute of a class"):
        fomoh_fx.transform(function, wrt="inputs")(torch.ones(3), tangents=(torch.ones(1, 3),))
    assert not hasattr(Table, "first")
    Table.first = None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_ensemble_of_a_module_outside(device):
    """As in PyTorch's tutorial: one module calls with the parameters of all."""
    torch.manual_seed(0)
    base = nn.Linear(3, 2, device=device, dtype=torch.float64)
    before = dict(base.named_parameters())
    x = torch.randn(5, 3, dtype=torch.float64)

    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 2, 3, dtype=torch.float64))
            self.bias = nn.Parameter(torch.randn(4, 2, dtype=torch.float64))

        def forward(self, x):
            def one(weight, bias):
                return torch.func.functional_call(base, {"weight": weight, "bias": bias}, (x,))

            return torch.vmap(one)(self.weight, self.bias).tanh().square().sum()

    model = Ensemble()
    parameters = dict(model.named_parameters())
    v = {name: torch.randn(2, *p.shape, dtype=p.dtype) for name, p in parameters.items()}

    def function(weight, bias):
        return (x @ weight.mT + bias.unsqueeze(1)).tanh().square().sum()

    _, tangent, cross = reverse_over_reverse(function, list(parameters.values()), list(v.values()))
    out = fomoh_fx.transform(model)(x, tangents=v)
    torch.testing.assert_close(out.tangent, tangent)
    torch.testing.assert_close(out.hessian(), cross)
    assert all(p is before[name] for name, p in base.named_parameters())


@pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(3))])
def test_torchscript(script):
    for model in (script(nn.Linear(3, 2)), nn.Sequential(script(nn.Linear(3, 2)))):
        with pytest.raises(fomoh_fx.ArgumentError, match="^model: is TorchScript"):
            fomoh_fx.transform(model)
