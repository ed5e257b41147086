"""What stands between a model and its graph is refused, though the model itself catches the refusal."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

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


def item(x):
    try:
        return x.sin().sum() if x.sum().item() > 0 else x.cos().sum()
    except Exception:
        return x.tanh().sum()


def size(x):
    count = 1
    with contextlib.suppress(Exception):
        count = int(x[x > 0].shape[0] > 2)
    return x.sin().sum() * count


def array(x):
    try:
        factor = float(np.asarray(x.detach()).sum())
    except Exception:
        factor = 1.0
    return x.sin().sum() * factor


def text(x):
    try:
        digits = len(f"{x[0]:.3f}")
    except TypeError:
        digits = 1
    return x.sin().sum() * digits


def second(function):
    x = torch.ones(6, dtype=torch.float64)
    return fomoh_fx.transform(function, wrt="inputs")(x, tangents=(torch.ones(1, 6, dtype=torch.float64),))


@pytest.mark.parametrize("function", [branch, number, boolean, item, size])
def test_data_that_decide(function):
    with pytest.raises(CaptureError, match="values of tensors decide"):
        second(function)


@pytest.mark.parametrize("function", [array, text])
def test_numbers_outside_of_torch(function):
    with pytest.raises(CaptureError, match="no frontend could capture"):
        second(function)


@pytest.mark.parametrize("read", [lambda x: np.from_dlpack(x.detach()).sum(), lambda x: x.data_ptr() % 7])
def test_memory(read):
    """Of a tensor without data it would be any number."""

    def function(x):
        try:
            return x.sin().sum() * float(read(x))
        except Exception:
            return x.cos().sum()

    with pytest.raises(CaptureError, match="reads the memory of a tensor"):
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


class Limited(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x):
        if len(x) > 4:
            raise KeyError(f"{len(x)} samples")
        return self.layer(x).sum()


def test_an_error_of_the_model_is_the_cause():
    """It is told once, with the line that raised it."""
    x = torch.ones(5, 3, dtype=torch.float64)
    with pytest.raises(CaptureError) as caught:
        fomoh_fx.grad(Limited())(x)
    assert isinstance(caught.value.__cause__, KeyError)
    assert str(caught.value).count("5 samples") == 1
    assert "raise KeyError" in str(caught.value) and "make_fx" not in str(caught.value)
