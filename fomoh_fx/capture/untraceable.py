"""Functions whose implementation in PyTorch branches on what their result does not need: data, or ``requires_grad``.

A frontend cannot trace them, or assumes too much; while a model is captured, the same mathematics runs in their place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _covariance(
    input: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None
) -> Tensor:
    """sum_n w_n (x_n - mean)(x_n - mean)^H / (sum w - correction); without weights every w is one."""
    x = input if input.ndim == 2 else input.reshape(1, input.numel())
    weight = _product(fweights, aweights)
    if weight is None:
        x = x - x.mean(1, keepdim=True)
        return (x @ x.mH / max(x.shape[1] - correction, 0)).squeeze()
    total = weight.sum()
    x = x - ((x * weight).sum(1) / total).unsqueeze(1)
    lost = correction if aweights is None or correction == 0 else correction * (weight * aweights).sum() / total
    return (x @ (x * weight).mH / (total - lost).clamp_min(0)).squeeze()


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a * b


def _correlation(input: Tensor) -> Tensor:
    """The covariance over the standard deviations, between -1 and 1 in each part."""
    covariance = _covariance(input)
    if covariance.ndim == 0:
        return covariance / covariance
    variance = covariance.diagonal()
    deviation = (variance.real if variance.is_complex() else variance).sqrt()
    c = covariance / deviation.unsqueeze(1) / deviation.unsqueeze(0)
    return torch.complex(c.real.clip(-1, 1), c.imag.clip(-1, 1)) if c.is_complex() else c.clip(-1, 1)


def _combinations(input: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
    """Every choice of r elements, in order."""
    choose = itertools.combinations_with_replacement if with_replacement else itertools.combinations
    chosen = [index for choice in choose(range(input.shape[0]), r) for index in choice]
    return input[torch.tensor(chosen, dtype=torch.int64, device=input.device)].reshape(len(chosen) // max(r, 1), r)


def _masked_select(input: Tensor, mask: Tensor) -> Tensor:
    """PyTorch bounds the number of selected elements by the input's, before it is broadcast to the mask."""
    return torch.masked_select(*torch.broadcast_tensors(input, mask))


def _linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """The chunked form computes a gradient beforehand, for those inputs that require one."""
    return torch.nn.functional.linear_cross_entropy(*args, **kwargs)


_BODIES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.cov: _covariance,
    torch.Tensor.cov: _covariance,
    torch.corrcoef: _correlation,
    torch.Tensor.corrcoef: _correlation,
    torch.combinations: _combinations,
    torch.masked_select: _masked_select,
    torch.Tensor.masked_select: _masked_select,
}
if hasattr(torch.nn.functional, "linear_cross_entropy"):  # since torch 2.13
    _BODIES[torch.nn.functional.linear_cross_entropy] = _linear_cross_entropy


def traceable(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    """The function, or its body for floating-point tensors where PyTorch's own cannot be traced."""
    floating = args and isinstance(args[0], Tensor) and (args[0].is_floating_point() or args[0].is_complex())
    return _BODIES.get(function, function) if floating else function
