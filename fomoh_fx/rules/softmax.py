"""Softmax and its logarithms, in closed form, numerically as stable as the primal.

With s = softmax(x), m_i = sum s x_i and u_i = x_i - m_i, let q_c = x_c + sum_ij S_c,ij u_i u_j. Then

    logsumexp     y_i = m_i         y_c = sum s q_c
    log_softmax   y_i = u_i         y_c = x_c - sum s q_c
    softmax       y_i = s u_i       y_c = s (q_c - sum s q_c)

An element that is -inf has s = 0 and takes no part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.rules.reduction import Part, from_right, reduction, restored
from fomoh_fx.rules.registry import register

aten = torch.ops.aten


class _Moments:
    """The averages under s along some dimensions, which are kept with size one."""

    def __init__(self, components: Components, x: HyperDual, s: Tensor, over: list[int]) -> None:
        self.s, self.over = s, over
        self.m, self.u, self.q = None, None, x.cross
        if x.tangent is not None:
            self.m = self.average(x.tangent)
            self.u = x.tangent - self.m
            if components.second_order is not None:
                self.q = add(x.cross, components.square(self.u))

    def average(self, part: Tensor) -> Tensor:
        return (self.s * part).sum(self.over, True)

    @property
    def q_average(self) -> Part:
        return None if self.q is None else self.average(self.q)


def _softmax(components: Components, x: HyperDual, y: Tensor, dim: int, *_: object) -> HyperDual:
    moments = _Moments(components, x, y, from_right(y, dim))
    tangent = None if moments.u is None else y * moments.u
    cross = None if moments.q is None else y * (moments.q - moments.q_average)
    return HyperDual(y, tangent, cross)


def _log_softmax(components: Components, x: HyperDual, y: Tensor, dim: int, *_: object) -> HyperDual:
    moments = _Moments(components, x, y.exp(), from_right(y, dim))
    cross = None if moments.q is None else add(x.cross, -moments.average(moments.q))
    return HyperDual(y, moments.u, cross)


def _logsumexp(components: Components, x: HyperDual, y: Tensor, dims: int | Sequence[int], keepdim: bool) -> HyperDual:
    over = from_right(x.primal, dims)
    value = restored(y, over, keepdim)
    value = aten.where.ScalarOther(value != -torch.inf, value, 0.0)  # all elements -inf: all s are zero, not undefined
    moments = _Moments(components, x, (x.primal - value).exp(), over)
    parts = [p if p is None or keepdim else p.squeeze(over) for p in (moments.m, moments.q_average)]
    return HyperDual(y, *parts)


register([aten._softmax.default, aten._safe_softmax.default], reduction(_softmax))
register(aten._log_softmax.default, reduction(_log_softmax))
register(aten.logsumexp.default, reduction(_logsumexp))
