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
