"""Transposes of single operators: what a change of the output says about one argument, the others held fixed.

``TRANSPOSES[op][i](delta, op's arguments)`` is phi_i^T delta for an operator that is linear in its argument number i.
:data:`PRODUCTS` mix the elements of an argument, so that only parameters are reached through them; every other
operator here moves, selects, scales or adds elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.rules.stacking import bind

aten = torch.ops.aten
Transpose = Callable[..., Tensor]


def _summed(delta: Tensor, like: Tensor) -> Tensor:
    """The sum over the axes along which an argument was broadcast, in its dtype."""
    summed = delta if delta.shape == like.shape else delta.sum_to_size(like.shape)
    return summed if summed.dtype == like.dtype else summed.to(like.dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _linear_weight(delta: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return aten.mm(_rows(delta).t(), _rows(x))


def _convolution(argument: int) -> Transpose:
    def transpose(delta: Tensor, x: Tensor, w: Tensor, b: Tensor | None, *options: Any) -> Tensor:
        bias = None if b is None else list(b.shape)
        mask = [False, argument == 1, argument == 2]
        return aten.convolution_backward.default(delta, x, w, bias, *options, mask)[argument]

    return transpose


def _embedding(delta: Tensor, w: Tensor, indices: Tensor, padding: int, by_frequency: bool, sparse: bool) -> Tensor:
    return aten.embedding_dense_backward.default(delta, indices, w.shape[0], padding, by_frequency)


def _max_pool(delta: Tensor, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> Tensor:
    _, at = aten.max_pool2d_with_indices.default(x, kernel, stride, padding, dilation, ceil)
    return aten.max_pool2d_with_indices_backward.default(delta, x, kernel, stride, padding, dilation, ceil, at)


def _permute(delta: Tensor, x: Tensor, dims: list[int]) -> Tensor:
    order = [d % x.ndim for d in dims]
    return delta.permute([order.index(d) for d in range(x.ndim)])


def _scaled(delta: Tensor, alpha: Any) -> Tensor:
    return delta if alpha == 1 else delta * alpha


#: Operators through which only a parameter is reached: argument number -> transpose.
PRODUCTS: dict[Any, Mapping[int, Transpose]] = {
    aten.linear.default: {1: _linear_weight, 2: lambda d, x, w, b: _summed(d, b)},
    aten.mm.default: {0: lambda d, x, w: aten.mm(d, w.t()), 1: lambda d, x, w: aten.mm(x.t(), d)},
    aten.bmm.default: {0: lambda d, x, w: aten.bmm(d, w.mT), 1: lambda d, x, w: aten.bmm(x.mT, d)},
    aten.convolution.default: {1: _convolution(1), 2: _convolution(2)},
    aten.embedding.default: {0: _embedding},
}

#: Operators that give every element another place.
LAYOUT: dict[Any, Mapping[int, Transpose]] = {
    aten.permute.default: {0: _permute},
    aten.transpose.int: {0: lambda d, x, a, b: d.transpose(a, b)},
    aten.t.default: {0: lambda d, x: d.t()},
    **{op: {0: lambda d, x, *_: d} for op in (aten.clone.default, aten.alias.default)},
    **{
        op: {0: lambda d, x, *_: d.reshape(x.shape)}
        for op in (
            aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
            aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
        )
    },
}  # fmt: skip

#: Operators that keep, move, select, scale or add elements.
LOCAL: dict[Any, Mapping[int, Transpose]] = {
    aten.add.Tensor: {0: lambda d, x, w, a: _summed(d, x), 1: lambda d, x, w, a: _summed(_scaled(d, a), w)},
    aten.sub.Tensor: {0: lambda d, x, w, a: _summed(d, x), 1: lambda d, x, w, a: _summed(-_scaled(d, a), w)},
    aten.mul.Tensor: {0: lambda d, x, w: _summed(d * w, x), 1: lambda d, x, w: _summed(d * x, w)},
    aten.div.Tensor: {0: lambda d, x, w: _summed(d / w, x)},
    aten.max_pool2d_with_indices.default: {0: _max_pool},
    aten.select.int: {0: lambda d, x, dim, at: aten.select_backward.default(d, x.shape, dim, at)},
    aten.slice.Tensor: {
        0: lambda d, x, dim, start, end, step: aten.slice_backward.default(
            d, x.shape, dim, 0 if start is None else start, x.shape[dim] if end is None else end, step
        )
    },
    **{op: {0: lambda d, x, *_: _summed(d, x)} for op in (aten.expand.default, aten._to_copy.default)},
    **LAYOUT,
}


def transpose_of(op: Any, argument: int) -> Transpose | None:
    """The transpose with respect to one argument, or None."""
    return PRODUCTS.get(op, LOCAL.get(op, {})).get(argument)


def transposed(op: Any, argument: int, delta: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """phi_i^T delta with all arguments of the operator's schema, defaults filled in."""
    transpose = transpose_of(op, argument)
    assert transpose is not None
    values = bind(op, tuple(args), kwargs)
    return transpose(delta, *values)
