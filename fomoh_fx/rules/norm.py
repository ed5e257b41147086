"""Normalisation layers, as composites: y = (x - m) / sqrt(v + eps) * weight + bias.

m and v are the mean and the variance of x over some dimensions, or running statistics. Half types are computed in
float32, as PyTorch does, and the result has the type of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fomoh_fx import operators  # noqa: F401  defines stop_gradient
from fomoh_fx.rules.precision import wide
from fomoh_fx.rules.registry import Composite, register

aten = torch.ops.aten
Optional = Tensor | None


def _statistics_dtype(x: Tensor, *parameters: Optional) -> torch.dtype:
    """The type of the means and deviations that PyTorch hands out: on a CPU that of the parameters, if any."""
    if x.device.type != "cpu":
        return wide(x).dtype
    return next((p.dtype for p in parameters if p is not None), x.dtype)


def _standardized(x: Tensor, over: Sequence[int], eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x - m) / sqrt(v + eps), then m, v and 1 / sqrt(v + eps) with the dimensions kept."""
    variance, mean = aten.var_mean.correction(x, over, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    return (x - mean) * rstd, mean, variance, rstd


def _affine(x: Tensor, weight: Optional, bias: Optional, shape: Sequence[int]) -> Tensor:
    """x * weight + bias, the two of them viewed in a shape that broadcasts."""
    x = x if weight is None else x * wide(weight).reshape(shape)
    return x if bias is None else x + wide(bias).reshape(shape)


def _native_layer_norm(
    x: Tensor, shape: Sequence[int], weight: Optional, bias: Optional, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, _, rstd = _standardized(wide(x), range(-len(shape), 0), eps)
    dtype = _statistics_dtype(x, weight, bias)
    return _affine(y, weight, bias, shape).to(x.dtype), mean.to(dtype), rstd.to(dtype)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Optional = None, bias: Optional = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:  # fmt: skip
    return _native_layer_norm(x, shape, weight, bias, eps)[0]


def _native_group_norm(
    x: Tensor, weight: Optional, bias: Optional, samples: int, channels: int, size: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    grouped = wide(x).reshape(samples, groups, channels // groups * size)
    y, mean, _, rstd = _standardized(grouped, [-1], eps)
    dtype = _statistics_dtype(x, weight, bias)
    y = _affine(y.reshape(x.shape), weight, bias, [channels, *[1] * (x.ndim - 2)])
    return y.to(x.dtype), mean.squeeze(-1).to(dtype), rstd.squeeze(-1).to(dtype)


def _group_norm(
    x: Tensor, groups: int, weight: Optional = None, bias: Optional = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:  # fmt: skip
    samples, channels, *sizes = x.shape
    return _native_group_norm(x, weight, bias, samples, channels, math.prod(sizes), groups, eps)[0]


def _fused_rms_norm(x: Tensor, shape: Sequence[int], weight: Optional, eps: float | None) -> tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * weight, and the reciprocal root."""
    value = wide(x)
    mean = value.square().mean(tuple(range(-len(shape), 0)), True)
    rstd = torch.rsqrt(mean + (torch.finfo(value.dtype).eps if eps is None else eps))
    return _affine(value * rstd, weight, None, shape).to(x.dtype), rstd


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Optional = None, eps: float | None = None) -> Tensor:
    return _fused_rms_norm(x, shape, weight, eps)[0]


# Batch normalisation: over all dimensions but the channels'. Running statistics move towards the batch's own.


def _per_channel(x: Tensor, statistic: Tensor) -> Tensor:
    return wide(statistic).reshape(-1, *[1] * (x.ndim - 2))


def _batch_norm_of_batch(
    x: Tensor, weight: Optional, bias: Optional, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and the batch's mean, variance and reciprocal deviation, one for each channel."""
    over = [0, *range(2, x.ndim)]
    y, *statistics = _standardized(wide(x), over, eps)
    y = _affine(y, weight, bias, [-1, *[1] * (x.ndim - 2)]).to(x.dtype)
    mean, variance, rstd = (statistic.reshape(-1) for statistic in statistics)
    return y, mean, variance, rstd


def _batch_norm_without_statistics(
    x: Tensor, weight: Optional, bias: Optional, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, _, rstd = _batch_norm_of_batch(x, weight, bias, eps)
    dtype = _statistics_dtype(x, weight, bias)
    return y, mean.to(dtype), rstd.to(dtype)


def _batch_norm_in_evaluation(
    x: Tensor, weight: Optional, bias: Optional, mean: Tensor, variance: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By the running statistics; on a CPU PyTorch saves none of them."""
    dtype = _statistics_dtype(x, weight, bias, mean)
    rstd = torch.rsqrt(wide(variance) + eps)
    y = (wide(x) - _per_channel(x, mean)) * _per_channel(x, rstd)
    y = _affine(y, weight, bias, [-1, *[1] * (x.ndim - 2)]).to(x.dtype)
    if x.device.type == "cpu":
        return y, x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
    return y, wide(mean).clone(), rstd


def _batch_norm_in_training(
    x: Tensor, weight: Optional, bias: Optional, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, mean, variance, rstd = _batch_norm_of_batch(x, weight, bias, eps)
    count = x.numel() // x.shape[1]
    new_mean = _moved(running_mean, mean, momentum)
    new_var = _moved(running_var, variance * count / (count - 1), momentum)
    dtype = _statistics_dtype(x, weight, bias, running_mean)
    return y, mean.to(dtype), rstd.to(dtype), new_mean, new_var


def _moved(running: Tensor, batch: Tensor, momentum: float) -> Tensor:
    """The running statistic after this batch, of which reverse mode knows no derivative."""
    moved = (wide(running) * (1 - momentum) + batch * momentum).to(running.dtype)
    return torch.ops.fomoh_fx.stop_gradient.default(moved)


def _batch_norm_functional(
    x: Tensor, weight: Optional, bias: Optional, running_mean: Tensor, running_var: Tensor, training: bool,
    momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if training:
        return _batch_norm_in_training(x, weight, bias, running_mean, running_var, momentum, eps)
    found = _batch_norm_in_evaluation(x, weight, bias, running_mean, running_var, momentum, eps)
    return *found, running_mean.clone(), running_var.clone()


def _batch_norm_with_update(
    x: Tensor, weight: Optional, bias: Optional, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, mean, rstd, *moved = _batch_norm_in_training(x, weight, bias, running_mean, running_var, momentum, eps)
    return y, mean, rstd, x.new_empty(0, dtype=torch.uint8), *moved  # type: ignore[return-value]


def _batch_norm_without_update(
    x: Tensor, weight: Optional, bias: Optional, mean: Tensor, variance: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = _batch_norm_in_evaluation(x, weight, bias, mean, variance, momentum, eps)
    return *found, x.new_empty(0, dtype=torch.uint8)


BODIES: dict[Any, Callable[..., Any]] = {
    aten.layer_norm.default: _layer_norm,
    aten.native_layer_norm.default: _native_layer_norm,
    aten.group_norm.default: _group_norm,
    aten.native_group_norm.default: _native_group_norm,
    aten.rms_norm.default: _rms_norm,
    aten._fused_rms_norm.default: _fused_rms_norm,
    aten._native_batch_norm_legit.no_stats: _batch_norm_without_statistics,
    aten._native_batch_norm_legit_no_training.default: _batch_norm_in_evaluation,
    aten._native_batch_norm_legit_functional.default: _batch_norm_functional,
    aten._batch_norm_with_update_functional.default: _batch_norm_with_update,
    aten._batch_norm_no_update.default: _batch_norm_without_update,
}
for op, body in BODIES.items():
    register(op, Composite(body))
