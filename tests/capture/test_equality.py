"""Branches on ``torch.equal`` of values that are computed alike."""

import pytest
import torch

import fomoh_fx
from fomoh_fx.errors import CaptureError
from tests.oracle import relative_error, reverse_over_reverse

X, V = torch.linspace(0.1, 1.2, 6, dtype=torch.float64).reshape(3, 2), torch.ones(2, 3, 2, dtype=torch.float64)
V[1, 0] = -2


def distances(x1, x2):
    """As a library of kernels does: zero on the diagonal where both are the same points."""
    squares = (x1.unsqueeze(1) - x2.unsqueeze(0)).square().sum(-1)
    return squares * (1 - torch.eye(len(x1)).to(x1)) if torch.equal(x1, x2) else squares


def kernel(x):
    return distances((x - x.mean(0)) / 3, (x - x.mean(0)) / 3).neg().exp().sum()


def test_what_is_computed_alike_is_equal():
    out = fomoh_fx.transform(kernel, wrt="inputs")(X, tangents=(V,))
    _, slopes, plane = reverse_over_reverse(kernel, (X,), (V,))
    assert relative_error(out.tangent, slopes) < 1e-12
    assert relative_error(out.hessian(), plane) < 1e-12


def test_what_is_not_a_number_is_equal_to_nothing():
    hd = fomoh_fx.transform(kernel, wrt="inputs")
    hd(X, tangents=(V,))
    with pytest.raises(RuntimeError, match=r"values are not equal.*at test_equality\.py:\d+, .*torch\.equal"):
        hd(X.log().neg().sqrt(), tangents=(V,))


def with_another_number(x):
    return distances(x / 3, x / 4).sum()


def changed_in_place(x):
    one, other = x / 3, x / 3
    other.add_(1)
    return distances(one, other).sum()


def drawn(x):
    return distances(x * torch.rand(2).to(x), x * torch.rand(2).to(x)).sum()


def of_two_arguments(x):
    return distances(x[:1] / 3, x[1:2] / 3).sum()


@pytest.mark.parametrize("model", [with_another_number, changed_in_place, drawn, of_two_arguments])
def test_what_the_data_decide_is_refused(model):
    with pytest.raises(CaptureError, match=r"torch\.equal"):
        fomoh_fx.transform(model, wrt="inputs")(X, tangents=(V,))


class Covariance(torch.autograd.Function):
    """As a library of kernels has it: backward takes what forward saves."""

    @staticmethod
    def forward(ctx, x1, x2, length, between):
        squares = between(x1.div(length), x2.div(length))
        value = squares.clone().div_(-2.0).exp_()
        ctx.save_for_backward(squares.mul_(value).div_(length))
        return value

    @staticmethod
    def backward(ctx, g):
        return None, None, g * ctx.saved_tensors[0], None


class Kernel(torch.nn.Module):
    def __init__(self, between, call=Covariance.apply):
        super().__init__()
        self.between, self.call = between, call
        self.length = torch.nn.Parameter(torch.tensor([[0.7]], dtype=torch.float64))

    def forward(self, x):
        return (self.call(x, x, self.length.exp(), self.between) * x[:, :1]).square().sum()


def plain(x1, x2, length, between):
    return (-between(x1 / length, x2 / length) / 2).exp()


def test_inside_a_function():
    hd, v = fomoh_fx.transform(Kernel(distances)), torch.tensor([[[1.0]], [[-2.0]]], dtype=torch.float64)
    out = hd(X, tangents={"length": v})
    same = Kernel(distances, plain)

    def truth(length):
        return torch.func.functional_call(same, {"length": length}, (X,))

    _, slopes, plane = reverse_over_reverse(truth, (same.length,), (v,))
    assert relative_error(out.tangent, slopes) < 1e-12
    assert relative_error(out.hessian(), plane) < 1e-12


def by_a_number_each(x1, x2):
    return distances(x1 / 3, x2 / 4)


def after_a_change(x1, x2):
    x1 = x1 + 0
    x1[0].add_(1)
    return distances(x1, x2)


@pytest.mark.parametrize("between", [by_a_number_each, after_a_change])
def test_inside_a_function_what_the_data_decide_is_refused(between):
    with pytest.raises(CaptureError, match=r"torch\.equal"):
        fomoh_fx.transform(Kernel(between))(X, tangents={"length": torch.ones(1, 1, 1).to(X)})
