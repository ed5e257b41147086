"""What a model asks of its values, and what it does to itself, while it runs: asserted, or refused."""

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import CaptureError
from tests.models.checking import Problem, check


def slope_of_sine(x):
    """A call that export cannot capture."""
    return torch.func.vmap(torch.func.grad(torch.sin))(x)


def along_ones(function, x, *rest):
    hd = fomoh_fx.transform(function, wrt="inputs")
    ones = torch.ones(1, *x.shape, dtype=x.dtype)
    return hd, lambda *args: hd(*args, tangents=[ones, *[None] * len(rest)])


def test_check_of_data():
    def function(x, n):
        torch._check_tensor_all(n > 0, lambda: "n must be positive")
        return (slope_of_sine(x) * x).sum()

    x, n = torch.rand(3, dtype=torch.float64), torch.tensor([1, 2])
    hd, call = along_ones(function, x, n)
    torch.testing.assert_close(call(x, n).tangent[0], (x.cos() - x * x.sin()).sum())
    assert hd.latest.program.frontend == "make_fx"
    with pytest.raises(RuntimeError, match="n must be positive"):
        call(x, -n)


def overflowing(x):
    y = (2 * x).exp()
    if not torch.isfinite(y).all():
        y = y.clamp(max=10)
    if torch.isnan(y).any() or y.isinf().any():
        y = y * 0
    return y.sum()


@pytest.mark.parametrize("frontend", ["torch.export", "make_fx"])
def test_branch_on_finite_values(frontend):
    """The branch for finite values is taken, and asserted."""

    def function(x):
        return overflowing(x) + (slope_of_sine(x).sum() * 0 if frontend == "make_fx" else 0)

    x = torch.rand(3, dtype=torch.float64)
    hd, call = along_ones(function, x)
    torch.testing.assert_close(call(x).tangent[0], 2 * (2 * x).exp().sum())
    assert hd.latest.program.frontend == frontend
    with pytest.raises(RuntimeError, match=r"not finite.*test_checks.py.*isfinite"):
        call(x * 1e4)


def test_branch_on_whether_any_value_is_finite(capfd):
    """Finite values do not decide everything: some of them may be. Nothing is printed beside the error."""

    def function(x):
        return x.sum() if torch.isnan(x).all() else (2 * x).sum()

    with pytest.raises(CaptureError, match=r"(?s)test_checks.py.*torch.where"):
        along_ones(function, torch.rand(3))[1](torch.rand(3))
    assert capfd.readouterr() == ("", "")


class Converted(nn.Module):
    """A module that converts a part of itself whenever it runs."""

    def __init__(self, dtype):
        super().__init__()
        self.layer, self.dtype = nn.Linear(3, 1), dtype

    def forward(self, x):
        self.layer = self.layer.to(self.dtype)
        return self.layer(x.to(self.dtype)).square().sum()


def test_conversion_that_changes_nothing():
    model, x = Converted(torch.float32), torch.rand(2, 3)
    tangents = {"layer.bias": torch.ones(1, 1)}
    out = fomoh_fx.transform(model)(x, tangents=tangents)
    torch.testing.assert_close(out.tangent[0], 2 * model.layer(x).detach().sum())


def test_conversion_is_refused():
    with pytest.raises(CaptureError, match=r"(?s)Linear from torch.float32.*float64.*beforehand.*self.layer.to"):
        fomoh_fx.transform(Converted(torch.float64))(torch.rand(2, 3), tangents={"layer.bias": torch.ones(1, 1)})


class Padded(nn.Module):
    """A branch and a shape that integers in buffers decide; a step count that the model changes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 1, 3, dtype=torch.float64))
        self.total = nn.Buffer(torch.tensor(2))
        self.steps = nn.Buffer(torch.tensor(0))

    def forward(self, x):
        self.steps.add_(1)
        left, right = self.total, self.total // 2
        if x.shape[-1] > max(left, right):
            x = torch.nn.functional.pad(x, (left, right))[..., : x.shape[-1] + right]
        return torch.nn.functional.conv1d(x, self.weight).square().sum()


def test_whole_numbers_of_the_model_are_constants():
    """Where they decide something; another value is another specialisation."""
    model, x = Padded(), torch.rand(1, 1, 4, dtype=torch.float64)
    hd, direction = fomoh_fx.transform(model), torch.ones(1, 2, 1, 3, dtype=torch.float64)
    for total, traced in ((2, 1), (2, 1), (3, 2), (9, 3)):
        model.total.fill_(total)
        out = hd(x, tangents={"weight": direction})
        value = torch.func.functional_call(model, {"weight": model.weight.detach() + 1e-6}, x)
        torch.testing.assert_close(out.tangent[0], (value - out.primal) / 1e-6, rtol=1e-4, atol=0)
        assert len(hd._traced) == traced
    assert model.steps == 8


def test_whole_number_that_the_model_changes_is_no_constant():
    class Counting(Padded):
        def forward(self, x):
            self.steps.add_(1)
            return super().forward(x if self.steps > 3 else x * 2)

    with pytest.raises(CaptureError, match=r"(?s)self.steps > 3.*torch.where"):
        fomoh_fx.transform(Counting())(
            torch.rand(1, 1, 4).double(), tangents={"weight": torch.ones(1, 2, 1, 3).double()}
        )


class MaskedUnderExport(nn.Module):
    """A mask of the wrong shape, made only where a model is told that it is exported."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        scores = self.layer(x)
        if torch.compiler.is_compiling():
            scores = scores + torch.zeros(4)
        return scores.softmax(-1).square().sum()


def test_a_model_that_fails_only_under_export_is_captured_as_it_runs_eagerly():
    check(Problem(MaskedUnderExport().double(), (torch.rand(2, 3).double(),)))
