"""The Laplacian of a network with respect to its inputs: the problem and its true result."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.models import mlp

#: Of the hidden layers, the same in all.
WIDTH, DEPTH = 512, 5


def make(
    dimensions: int, samples: int, device: str, dtype: torch.dtype, width: int = WIDTH
) -> tuple[nn.Sequential, Tensor]:
    """A scalar function of ``dimensions`` variables, and points."""
    torch.manual_seed(0)
    return mlp(dimensions, width, DEPTH, 1).to(device, dtype), torch.randn(samples, dimensions).to(device, dtype)


def truth(model: nn.Module, x: Tensor) -> Tensor:
    """By reverse-over-reverse in float64: samples are independent, so that one sum serves all of them."""
    dtype = x.dtype
    try:
        model.double()
        at = x.detach().double().requires_grad_()
        gradient = torch.autograd.grad(model(at).sum(), at, create_graph=True)[0]
        total = torch.zeros(len(at), dtype=torch.float64, device=at.device)
        for d in range(at.shape[1]):
            total += torch.autograd.grad(gradient[:, d].sum(), at, retain_graph=True)[0][:, d]
        return total[:, None]
    finally:
        model.to(dtype)
