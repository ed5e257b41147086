"""Linear operators: every component goes through the operator itself, and second order adds nothing.

y_i = phi(x_i), y_c = phi(x_c), for operators that are jointly linear in the arguments with components.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.rules.registry import Rule, register
from fomoh_fx.rules.stacking import batched, primals


def linear(stacked: Callable[..., Any] | None = None) -> Rule:
    """The rule of an operator that is linear in its one active argument.

    Args:
        stacked: ``stacked(op, component, *args, **kwargs)``, the operator applied to components with a leading axis,
            where a form better than vmap's is known; ``args`` are the primals of the arguments.
    """

    def rule(op: Callable[..., Any], components: Components, *args: Any, **kwargs: Any) -> Any:
        plain, options = primals(args, kwargs)
        y = op(*plain, **options)
        names = [*range(len(args)), *kwargs]
        (at,) = [n for n, a in zip(names, [*args, *kwargs.values()], strict=True) if isinstance(a, HyperDual)]
        x = args[at] if isinstance(at, int) else kwargs[at]

        def through(component: Tensor | None) -> Any:
            if component is None:
                return None
            if stacked is not None:
                return stacked(op, component, *plain, **options)
            return batched(op, plain, options, {at: component})

        return joined(y, through(x.tangent), through(x.cross))

    rule.kind = "linear"  # type: ignore[attr-defined]
    return rule


def joined(primal: Any, tangent: Any, cross: Any) -> Any:
    """A HyperDual for each tensor of an output of one or several; what is not floating is a constant."""
    leaves, spec = pytree.tree_flatten(primal)
    tangents = [None] * len(leaves) if tangent is None else pytree.tree_leaves(tangent)
    crosses = [None] * len(leaves) if cross is None else pytree.tree_leaves(cross)
    parts = [
        HyperDual(y, t, c) if isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex()) else y
        for y, t, c in zip(leaves, tangents, crosses, strict=True)
    ]
    return pytree.tree_unflatten(parts, spec)


def constant() -> Rule:
    """The rule of an operator whose derivative is zero wherever it exists (comparisons, rounding, sampling)."""

    def rule(op: Callable[..., Any], components: Components, *args: Any, **kwargs: Any) -> Any:
        plain, options = primals(args, kwargs)
        return op(*plain, **options)

    rule.kind = "constant"  # type: ignore[attr-defined]
    return rule


aten = torch.ops.aten

#: Operators that move or sum what they are given, each linear in its first argument.
MOVES = [
    aten.view, aten.reshape, aten._unsafe_view, aten.permute, aten.transpose.int, aten.t, aten.numpy_T, aten.mT,
    aten.unsqueeze, aten.squeeze, aten.expand, aten.flatten, aten.unflatten, aten.movedim, aten.swapaxes,
    aten.clone, aten.contiguous, aten.alias, aten.view_as, aten.slice.Tensor, aten.select.int, aten.narrow, aten.diagonal,
    aten.split.Tensor, aten.split_with_sizes, aten.chunk, aten.unbind.int, aten.unfold, aten.as_strided,
    aten.repeat, aten.tile, aten.flip, aten.roll, aten.rot90, aten.tril, aten.triu, aten.diag_embed, aten.trace,
    aten.constant_pad_nd, aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d,
    aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d, aten.pixel_shuffle, aten.pixel_unshuffle,
    aten.channel_shuffle, aten.im2col, aten.col2im,
]  # fmt: skip

#: Sums, averages and interpolations.
SUMS = [
    aten.sum, aten.mean, aten.nansum, aten.cumsum, aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten._adaptive_avg_pool2d,
    aten._adaptive_avg_pool3d, aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d,
    aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_trilinear3d, aten.upsample_bicubic2d,
    aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa,
]  # fmt: skip

#: Real-linear operators on complex values, and Fourier transforms.
COMPLEX = [
    aten._fft_r2c, aten._fft_c2r, aten._fft_c2c, aten.view_as_real, aten.view_as_complex, aten.real, aten.imag,
    aten.conj, aten._conj, aten._conj_physical, aten.conj_physical, aten.resolve_conj, aten.resolve_neg,
]  # fmt: skip

for packet in [*MOVES, *SUMS, *COMPLEX]:
    register(packet, linear())
register([aten._to_copy.default, aten.to], linear())
