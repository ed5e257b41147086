"""Tensors that a model computed from its parameters before, and kept."""

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import CaptureError


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
