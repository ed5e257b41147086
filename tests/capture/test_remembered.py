"""Tensors that a model computed from its parameters before, and kept."""

import copy

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import CaptureError
from tests.oracle import reverse_over_reverse


class Remembers(nn.Module):
    """Computes a table once, as models do that cache an attention bias in eval mode."""

    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.kept, self.detached = {}, detached

    def forward(self, x):
        if "table" not in self.kept:
            table = self.weight.exp()
            self.kept["table"] = table.detach() if self.detached else table
        return (x * self.kept["table"] * self.weight).sum()


def test_what_was_computed_from_a_parameter_is_refused():
    model, x, v = Remembers(), torch.randn(3), {"weight": torch.randn(2, 3)}
    model(x)
    with pytest.raises(CaptureError, match="computed from the parameter 'weight'.*detach it"):
        fomoh_fx.transform(model)(x, tangents=v)


def test_what_was_detached_is_a_constant():
    model, x, v = Remembers(detached=True), torch.randn(3), {"weight": torch.randn(2, 3)}
    model(x)
    out = fomoh_fx.transform(model)(x, tangents=v)
    torch.testing.assert_close(out.tangent, (v["weight"] * x * model.kept["table"]).sum(1))


def test_what_another_models_parameters_made_is_a_constant():
    other = nn.Parameter(torch.randn(3))
    made = other.exp()
    x, v = torch.randn(3), torch.randn(2, 3)
    out = fomoh_fx.transform(lambda x: (x * x * made).sum(), wrt="inputs")(x, tangents=(v,))
    torch.testing.assert_close(out.tangent, (2 * x * made * v).sum(1).detach())


class Recurrent(nn.Module):
    """Keeps its state as it is, with what autograd has recorded, and detaches it when it goes on."""

    def __init__(self, also_attached: bool = False) -> None:
        super().__init__()
        self.cell, self.state, self.also_attached = nn.LSTMCell(3, 2).double(), None, also_attached

    def forward(self, x):
        if self.state is None:
            hidden = torch.zeros(4, 2).double(), torch.zeros(4, 2).double()
        else:
            hidden = tuple(part.detach() for part in self.state)
        before = self.state[0] if self.also_attached and self.state is not None else 0
        self.state = self.cell(x, hidden)
        return (self.state[0] + before).square().sum()


@pytest.mark.parametrize("first", ["transformed", "eager"])
def test_a_state_that_is_detached_when_it_is_used(first):
    """Truncated backpropagation: the derivative ends where this call began."""
    torch.manual_seed(0)
    ours = Recurrent()
    theirs = copy.deepcopy(ours)
    hd = fomoh_fx.transform(ours)
    parameters = list(ours.parameters())
    v = [torch.randn(2, *p.shape).double() for p in parameters]
    for step, x in enumerate(torch.randn(4, 4, 3).double()):
        before = theirs.state

        def function(*values, x=x, before=before):
            theirs.state = before
            return torch.func.functional_call(
                theirs, dict(zip(dict(theirs.named_parameters()), values, strict=True)), x
            )

        value, tangent, cross = reverse_over_reverse(function, parameters, v)
        if first == "eager" and step == 0:
            ours(x)
        else:
            out = hd(x, tangents=dict(zip(dict(ours.named_parameters()), v, strict=True)))
            torch.testing.assert_close(out.primal, value)
            torch.testing.assert_close(out.tangent, tangent)
            torch.testing.assert_close(out.hessian(), cross)
        torch.testing.assert_close(ours.state, theirs.state)
        with torch.no_grad():
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                p.mul_(0.9)
                q.mul_(0.9)


@pytest.mark.parametrize("first", ["transformed", "eager"])
def test_a_state_that_is_detached_in_one_place_only_is_refused(first):
    model, x = Recurrent(also_attached=True), torch.randn(4, 3).double()
    hd, v = fomoh_fx.transform(model), {n: torch.randn(2, *p.shape).double() for n, p in model.named_parameters()}
    hd(x, tangents=v) if first == "transformed" else model(x)
    with pytest.raises(CaptureError, match="computed from the parameter 'cell.*detach it"):
        hd(x, tangents=v)
