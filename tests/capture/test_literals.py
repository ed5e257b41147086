"""Tensors that a model writes out: their values may decide a branch, until others are written there."""

import numpy
import pytest
import torch
from torch import Tensor

import fomoh_fx
from fomoh_fx.errors import CaptureError
from tests.rules.checking import Sample, check


def r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def normalised(x: Tensor) -> Tensor:
    deviation = torch.as_tensor([0.2, 0.3, 0.5], dtype=x.dtype)
    if (deviation == 0).any():
        raise ValueError("a deviation is zero")
    return x / deviation


def repeated(x: Tensor) -> Tensor:
    return x.square().repeat_interleave(int(torch.tensor([1, 2]).sum()))


def changed(x: Tensor) -> Tensor:
    """Also through a view, by other literals."""
    scale = torch.tensor([1, 2, 3])
    scale[0] = 5
    scale[1:].fill_(4)
    return x.square() * int(scale.sum())


def selected(x: Tensor) -> Tensor:
    return x.square()[torch.tensor([True, False, True])]


def from_numpy(x: Tensor) -> Tensor:
    return x.square() * torch.from_numpy(numpy.linspace(1, 2, 3)) + float(numpy.sqrt(2))


LITERAL = [normalised, repeated, changed, selected, from_numpy]


@pytest.mark.parametrize("function", LITERAL, ids=lambda f: f.__name__)
def test_literals_decide(function):
    check(function, Sample((r(3),)))


def overwritten(x: Tensor) -> Tensor:
    scale = torch.tensor([1.0, 2, 3], dtype=x.dtype)
    scale[1:].copy_(x[1:].detach())
    return x * 5 if scale.sum() == 6 else x * 7


def overwritten_number(x: Tensor) -> Tensor:
    """PyTorch's tracer alone takes the value from before."""
    scale = torch.tensor(2.0, dtype=x.dtype)
    scale.view(1).copy_(x[:1].detach())
    return x * 5 if scale == 2 else x * 7


@pytest.mark.parametrize("function", [overwritten, overwritten_number], ids=lambda f: f.__name__)
def test_overwritten_values_are_data(function):
    with pytest.raises(CaptureError, match="values of tensors decide"):
        fomoh_fx.transform(function, wrt="inputs")(r(3), tangents=[r(2, 3)])
