"""Torchvision's operators: pooling of regions of interest, and convolution at displaced points.

Pooling is linear in the image, channel by channel (or by groups of channels that are pooled alike), so the components
are more channels of one image. Regions have no derivative, as in reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.rules.linear import joined
from fomoh_fx.rules.registry import Composite, Rule
from fomoh_fx.rules.resampling import at_points
from fomoh_fx.rules.stacking import primals


def _pooling(through: Callable[..., Tensor]) -> Rule:
    """The rule of an operator on (image [N, C, H, W], regions [R, 5], ..): ``through(op, part, pooled, *args)``."""

    def rule(op: Any, components: Components, *args: Any) -> Any:
        plain, _ = primals(args, {})
        pooled = op(*plain)
        x = args[0] if isinstance(args[0], HyperDual) else HyperDual(args[0])
        parts = (None if p is None else through(op, p, pooled, *plain) for p in (x.tangent, x.cross))
        if isinstance(pooled, Tensor):
            return joined(pooled, *parts)
        tangent, cross = ([p, None] for p in parts)  # the second output are indices
        return joined(tuple(pooled), tangent, cross)

    return rule


def _values(pooled: Any) -> Tensor:
    return pooled if isinstance(pooled, Tensor) else pooled[0]


def _as_channels(op: Any, part: Tensor, pooled: Any, x: Tensor, regions: Tensor, *options: Any) -> Tensor:
    """The average over parts of each region; a component is C more channels."""
    n, channels, *sizes = x.shape
    wide = part.movedim(0, 1).reshape(n, part.shape[0] * channels, *sizes)
    out = _values(op(wide, regions, *options))
    count, *shape = _values(pooled).shape
    return out.reshape(count, part.shape[0], *shape).movedim(1, 0)


def _at_maxima(op: Any, part: Tensor, pooled: Any, x: Tensor, regions: Tensor, *options: Any) -> Tensor:
    """The elements at which the maxima were attained; an empty part has the index -1 and the value 0."""
    values, indices = pooled
    images = part.index_select(1, regions[:, 0].to(torch.int64)).flatten(-2)
    where = indices.flatten(2).to(torch.int64)
    chosen = images.gather(-1, where.clamp(min=0).expand(part.shape[0], *where.shape))
    return torch.ops.aten.where.ScalarOther(where >= 0, chosen, 0.0).reshape(part.shape[0], *values.shape)


def deform_conv2d(
    x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, stride_h: int, stride_w: int, pad_h: int,
    pad_w: int, dilation_h: int, dilation_w: int, groups: int, offset_groups: int, use_mask: bool,
) -> Tensor:  # fmt: skip
    """A convolution whose taps read the image (zero outside of it) at displaced points, each scaled by its mask."""
    n, channels, *sizes = x.shape
    outputs, _, *kernel = weight.shape
    high, wide = offset.shape[-2:]
    taps = kernel[0] * kernel[1]
    displaced = offset.reshape(n * offset_groups, taps, 2, high, wide)
    rows = torch.arange(high, device=x.device).unsqueeze(1) * stride_h - pad_h
    columns = torch.arange(wide, device=x.device) * stride_w - pad_w
    row_of_tap = torch.arange(kernel[0], device=x.device).repeat_interleave(kernel[1]) * dilation_h
    column_of_tap = torch.arange(kernel[1], device=x.device).repeat(kernel[0]) * dilation_w
    coordinates = [
        displaced.select(2, 0) + (rows + row_of_tap.reshape(-1, 1, 1)),
        displaced.select(2, 1) + (columns + column_of_tap.reshape(-1, 1, 1)),
    ]
    read = at_points(x.reshape(n * offset_groups, channels // offset_groups, *sizes), coordinates)
    if use_mask:
        read = read * mask.reshape(n * offset_groups, 1, taps, high, wide)
    read = read.reshape(n, groups, channels // groups * taps, high * wide)
    out = weight.reshape(groups, outputs // groups, -1) @ read
    return out.reshape(n, outputs, high, wide) + bias.reshape(-1, 1, 1)


#: By name: the operators exist once torchvision is imported.
RULES: dict[str, tuple[Rule | Composite, str]] = {
    "torchvision::roi_align": (_pooling(_as_channels), "linear"),
    "torchvision::ps_roi_align": (_pooling(_as_channels), "linear"),
    "torchvision::ps_roi_pool": (_pooling(_as_channels), "linear"),
    "torchvision::roi_pool": (_pooling(_at_maxima), "selection"),
    "torchvision::deform_conv2d": (Composite(deform_conv2d), "composite"),
}
