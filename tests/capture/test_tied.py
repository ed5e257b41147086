"""Tied parameters are one input, under the first of their names."""

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import ArgumentError, CaptureError
from tests.models.checking import Problem, check


class ThreeNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(7, 4)
        self.encoder, self.decoder = nn.Embedding(7, 4), nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.encoder.weight = self.decoder.weight = self.head.weight = self.shared.weight

    def forward(self, tokens):
        return self.head((self.encoder(tokens) * self.decoder(tokens.flip(0))).tanh())


@pytest.fixture
def model():
    return ThreeNames().double()


TOKENS = torch.tensor([1, 3, 6])


def test_every_use_is_differentiated(model):
    check(Problem(model, (TOKENS,)))


def test_an_alias_names_the_same_parameter(model):
    tangent = torch.randn(2, 7, 4, dtype=torch.float64)
    hd = fomoh_fx.transform(model)
    first = hd(TOKENS, tangents={"shared.weight": tangent})
    alias = hd(TOKENS, tangents={"head.weight": tangent})
    torch.testing.assert_close(alias.cross, first.cross, rtol=0, atol=0)


def test_two_names_at_once_are_refused(model):
    tangent = torch.randn(2, 7, 4, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="one tied parameter"):
        fomoh_fx.transform(model)(TOKENS, tangents={"head.weight": tangent, "shared.weight": tangent})


def test_the_graph_has_one_input_for_it(model):
    tangent = torch.randn(2, 7, 4, dtype=torch.float64)
    program = fomoh_fx.transform(model).trace(TOKENS, tangents={"shared.weight": tangent}).program
    assert [what.name for what in program.inputs if what.kind == "parameter"] == ["shared.weight"]


class TwiceThere(nn.Module):
    """One module under two names, as a loss that refers to the model."""

    def __init__(self, branches):
        super().__init__()
        self.layer, self.branches = nn.BatchNorm1d(3), branches
        self.same = nn.ModuleList([self.layer])

    def forward(self, x):
        first = self.layer(x).exp()
        if self.branches and first.sum() > 0:
            first = first * 2
        (slope,) = torch.autograd.grad(first.sum(), self.layer.bias, create_graph=True)
        return self.same[0](x).sin() @ slope


def test_a_module_with_two_names_is_as_before():
    model = TwiceThere(False).double()
    before = [*model.parameters(), *model.buffers()]
    check(Problem(model, (torch.randn(4, 3, dtype=torch.float64),)))
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], before, strict=True))


def test_a_module_with_two_names_is_as_before_a_refusal():
    model = TwiceThere(True).double()
    before = [*model.parameters(), *model.buffers()]
    with pytest.raises(CaptureError, match="first.sum"):
        fomoh_fx.transform(model)(torch.randn(4, 3).double(), tangents={"layer.bias": torch.ones(1, 3).double()})
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], before, strict=True))
