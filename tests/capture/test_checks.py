"""Checks of values that a model makes: they stay in the graph."""

import pytest
import torch

import fomoh_fx


def checked(x, n):
    """What export cannot capture (vmap of grad), after a check of data."""
    torch._check_tensor_all(n > 0, lambda: "n must be positive")
    return (torch.func.vmap(torch.func.grad(torch.sin))(x) * x).sum()


def test_check_of_data():
    hd = fomoh_fx.transform(checked, wrt="inputs")
    x, v = torch.rand(3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    out = hd(x, torch.tensor([1, 2]), tangents=[v, None])
    assert hd.latest.program.frontend == "make_fx"
    torch.testing.assert_close(out.tangent[0], (x.cos() - x * x.sin()).sum())
    with pytest.raises(RuntimeError, match="n must be positive"):
        hd(x, torch.tensor([1, -2]), tangents=[v, None])
