"""Tied parameters are one input, under the first of their names."""

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import ArgumentError
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
