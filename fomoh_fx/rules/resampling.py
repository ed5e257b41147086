"""Padding, pooling by averages, interpolation, and sampling at points of a grid.

The components are more samples of one batch: [K, N, C, ..] becomes [K * N, C, ..], and [K, C, ..] is a batch as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from fomoh_fx.rules.linear import linear, mapped
from fomoh_fx.rules.registry import Composite, Rule, register
from fomoh_fx.rules.stacking import fold, unfold

aten = torch.ops.aten


def in_batch(unbatched: int) -> Rule:
    """The rule of a linear operator on [N, ..] that also takes one sample of ``unbatched`` dimensions."""

    def stacked(op: Any, part: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.ndim == unbatched:
            return op(part, *args, **kwargs)
        return unfold(op(fold(part), *args, **kwargs), part.shape[0])

    return linear(stacked)


def _without_batch(op: Any, part: Tensor, x: Tensor, *args: Any) -> Tensor:
    return op(part, *args)


#: Operators on [N, C, *spatial] or [C, *spatial], by the number of dimensions of one sample.
SAMPLED = {
    2: [aten.reflection_pad1d.default, aten.replication_pad1d.default, aten.col2im.default, aten.avg_pool1d.default],
    3: [
        aten.reflection_pad2d.default, aten.replication_pad2d.default, aten.im2col.default, aten.avg_pool2d.default,
        aten._adaptive_avg_pool2d.default,
    ],
    4: [
        aten.reflection_pad3d.default, aten.replication_pad3d.default, aten.avg_pool3d.default,
        aten._adaptive_avg_pool3d.default,
    ],
}  # fmt: skip

#: Operators on [N, C, *spatial] only.
BATCHED = [
    aten.channel_shuffle.default,
    *(getattr(getattr(aten, name), overload) for overload in ("default", "vec") for name in (
        "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
        "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    )),
]  # fmt: skip

for sample, ops in SAMPLED.items():
    register(ops, in_batch(sample))
register(BATCHED, in_batch(-1))
register([aten.pixel_shuffle.default, aten.pixel_unshuffle.default], linear(_without_batch))
register(aten.constant_pad_nd.default, mapped(lambda part, y, x, pad, value: aten.constant_pad_nd.default(part, pad)))


def _coordinate(c: Tensor, size: int, padding: int, align_corners: bool) -> Tensor:
    """A coordinate from [-1, 1] in pixels, brought inside by the padding mode (0 zeros, 1 border, 2 reflection)."""
    c = (c + 1) * ((size - 1) / 2) if align_corners else (c + 1) * (size / 2) - 0.5
    low, span = (0.0, size - 1.0) if align_corners else (-0.5, size * 1.0)
    if padding == 2 and span > 0:
        distance = (c - low).abs()
        rest = aten.fmod.Scalar(distance, span)
        odd = (distance / span).floor() % 2 == 1
        c = torch.where(odd, span - rest, rest) + low
    return c if padding == 0 else aten.hardtanh.default(c, 0, size - 1)  # at the border itself no derivative


def at_points(x: Tensor, coordinates: Sequence[Tensor], nearest: bool = False) -> Tensor:
    """[N, C, *sizes] at points [N, *points] given by one coordinate in pixels for each size: [N, C, *points].

    The sum over the corners around each point of value times distances, or the nearest value; zero outside.
    """
    n, channels, *sizes = x.shape
    points = coordinates[0].shape[1:]
    lower = [c.round() if nearest else c.floor() for c in coordinates]
    flat = x.flatten(2)
    total = None
    for corner in itertools.product((0, 1), repeat=0 if nearest else len(sizes)):
        weight, inside, index = None, None, None
        for a, size in enumerate(sizes):
            at = lower[a] if nearest else lower[a] + corner[a]
            within = (at >= 0) & (at <= size - 1)
            place = at.clamp(0, size - 1).to(torch.int64)
            inside = within if inside is None else inside & within
            index = place if index is None else index * size + place
            if not nearest:
                distance = coordinates[a] - lower[a]
                share = distance if corner[a] else 1 - distance
                weight = share if weight is None else weight * share
        assert index is not None and inside is not None  # a point has a coordinate
        value = flat.gather(2, index.flatten(1).unsqueeze(1).expand(n, channels, -1)).reshape(n, channels, *points)
        value = aten.where.ScalarOther(inside.unsqueeze(1), value, 0.0)
        value = value if weight is None else value * weight.unsqueeze(1)
        total = value if total is None else total + value
    assert total is not None  # a point has a corner
    return total


def _grid_sampler(x: Tensor, grid: Tensor, mode: int, padding: int, align_corners: bool) -> Tensor:
    """Linear interpolation between the corners around each point (mode 0), or the nearest value (mode 1)."""
    sizes = x.shape[2:]
    coordinates = [
        _coordinate(grid.select(-1, len(sizes) - 1 - a), size, padding, align_corners) for a, size in enumerate(sizes)
    ]
    return at_points(x, coordinates, nearest=mode == 1)


def _grid_sampler_2d(x: Tensor, grid: Tensor, mode: int, padding: int, align_corners: bool) -> Tensor:
    if mode == 2:
        return decomposition_table[aten.grid_sampler_2d.default](x, grid, mode, padding, align_corners)
    return _grid_sampler(x, grid, mode, padding, align_corners)


register(aten.grid_sampler_2d.default, Composite(_grid_sampler_2d))
register(aten.grid_sampler_3d.default, Composite(_grid_sampler))
