"""What stands between a model and its graph is refused, though the model itself catches the refusal."""

import contextlib

import pytest
import torch

import fomoh_fx
from fomoh_fx.errors import CaptureError


def branch(x):
    try:
        if x.sum() > 0:
            return x.sin().sum()
    except Exception:
        pass
    return x.cos().sum()


def number(x):
    factor = 1
    with contextlib.suppress(RuntimeError):
        factor = int(x.sum())
    return x.sin().sum() * factor


def boolean(x):
    try:
        large = bool(x.max() > 0)
    except Exception:
        large = False
    return x.sin().sum() if large else x.cos().sum()


def gradient(x):
    z = x.detach().requires_grad_()
    with torch.enable_grad():
        z.sin().sum().backward()
    return (z.grad.square() * x).sum()


def second(function):
    x = torch.ones(6, dtype=torch.float64)
    return fomoh_fx.transform(function, wrt="inputs")(x, tangents=(torch.ones(1, 6, dtype=torch.float64),))


@pytest.mark.parametrize("function", [branch, number, boolean])
def test_data_that_decide(function):
    with pytest.raises(CaptureError, match="values of tensors decide"):
        second(function)


def test_backward():
    with pytest.raises(CaptureError, match=r"\.backward\(\).*torch\.autograd\.grad"):
        second(gradient)


def test_an_error_that_the_model_makes_itself_is_no_matter():
    def function(x):
        try:
            raise ValueError
        except ValueError:
            return x.sin().sum()

    torch.testing.assert_close(second(function).tangent[0], 6 * torch.ones((), dtype=torch.float64).cos())
