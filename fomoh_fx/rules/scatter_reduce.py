"""Reductions at indices: y[p] is the sum, mean, product or extreme value of the members of p.

The members of a place are the elements of the source whose index names it and, with ``include_self`` or where no
index names it, the element of the target that is already there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.rules.indexing import scattered
from fomoh_fx.rules.registry import Composite, register

aten = torch.ops.aten
Part = Tensor | None


@dataclass(frozen=True)
class Members:
    """Which elements belong to which place."""

    x: Tensor
    dim: int
    index: Tensor
    source: Tensor
    own: Tensor | None  # where the target's element is a member; None for everywhere

    def total(self, x: Part, source: Part) -> Part:
        """The sum over the members of each place, of every component."""
        if x is not None and self.own is not None:
            x = aten.where.ScalarOther(self.own, x, 0.0)
        return scattered(x, source, self.x, self.dim, self.index)

    def count(self, x: Tensor, source: Tensor) -> Tensor:
        """How many members of each place fulfil a condition."""
        x = x if self.own is None else x & self.own
        return aten.scatter_add.default(x.to(torch.int64), self.dim, self.index, source.to(torch.int64))


def _scatter_reduce(
    op: Any,
    components: Components,
    x: Any,
    dim: int,
    index: Tensor,
    source: Any,
    reduce: str,
    *,
    include_self: bool = True,
) -> HyperDual:
    x, source = (a if isinstance(a, HyperDual) else HyperDual(a) for a in (x, source))
    y = op(x.primal, dim, index, source.primal, reduce, include_self=include_self)
    own = None
    if not include_self:
        everywhere = torch.ones(x.primal.shape, dtype=torch.bool, device=index.device)
        own = aten.scatter.value(everywhere, dim, index, False)
    if source.primal.shape != index.shape:  # an index may name fewer elements than the source has
        used = tuple(slice(0, n) for n in index.shape)
        parts = [None if p is None else p[(slice(None), *used)] for p in (source.tangent, source.cross)]
        source = HyperDual(source.primal[used], *parts)
    members = Members(x.primal, dim, index, source.primal, own)
    return _REDUCTIONS[reduce](members, components, y, x, source)


def _sum(members: Members, components: Components, y: Tensor, x: HyperDual, source: HyperDual) -> HyperDual:
    return HyperDual(y, members.total(x.tangent, source.tangent), members.total(x.cross, source.cross))


def _mean(members: Members, components: Components, y: Tensor, x: HyperDual, source: HyperDual) -> HyperDual:
    ones = [torch.ones(t.shape, dtype=torch.bool, device=t.device) for t in (members.x, members.index)]
    count = members.count(*ones)

    def through(x: Part, source: Part) -> Part:
        total = members.total(x, source)
        return None if total is None else total / count

    return HyperDual(y, through(x.tangent, source.tangent), through(x.cross, source.cross))


def _extreme(members: Members, components: Components, y: Tensor, x: HyperDual, source: HyperDual) -> HyperDual:
    """Members that attain the extreme value share it equally, as in reverse mode."""
    x_attains = members.x == y
    source_attains = members.source == aten.gather.default(y, members.dim, members.index)
    count = members.count(x_attains, source_attains)

    def through(x: Part, source: Part) -> Part:
        x = None if x is None else aten.where.ScalarOther(x_attains, x, 0.0)
        source = None if source is None else aten.where.ScalarOther(source_attains, source, 0.0)
        total = members.total(x, source)
        return None if total is None else total / count

    return HyperDual(y, through(x.tangent, source.tangent), through(x.cross, source.cross))


def _product(members: Members, components: Components, y: Tensor, x: HyperDual, source: HyperDual) -> HyperDual:
    """The product rule without division by zero.

    With P the product of a place's members m that are not zero, a_i = sum m_i / m over those, and b_i = sum m_i over
    the members that are zero::

        zeros   first order   second order
        0       P a_i         P (a_i a_j - sum (m_i / m)(m_j / m))
        1       P b_i         P (a_i b_j + a_j b_i)
        2       0             P (b_i b_j - sum m_i m_j)
        more    0             0
    """
    zero = [members.x == 0, members.source == 0]
    inverse = [1 / v.masked_fill(z, 1) for v, z in zip((members.x, members.source), zero, strict=True)]
    zeros = members.count(*zero)
    rest = [v.masked_fill(z, 1) for v, z in zip((members.x, members.source), zero, strict=True)]
    p = aten.scatter_reduce.two(rest[0], members.dim, members.index, rest[1], "prod", include_self=members.own is None)

    def relative(part: Part, n: int) -> Part:
        return None if part is None else aten.where.ScalarSelf(zero[n], 0.0, part * inverse[n])

    def at_zeros(part: Part, n: int) -> Part:
        return None if part is None else aten.where.ScalarOther(zero[n], part, 0.0)

    def by_zeros(*cases: Part) -> Tensor:
        """P times the case for as many zeros as there are at each place."""
        chosen = [aten.where.ScalarOther(zeros == n, case, 0.0) for n, case in enumerate(cases)]
        return p * add(*chosen)

    def first(order: str) -> Part:
        parts = [getattr(v, order) for v in (x, source)]
        if all(part is None for part in parts):
            return None
        return by_zeros(*(members.total(*(of(part, n) for n, part in enumerate(parts))) for of in (relative, at_zeros)))

    tangent, cross = first("tangent"), None
    if components.second_order is not None:
        cross = first("cross")
        if tangent is not None:
            (a, a_squares), (b, b_squares) = (
                _sums(members, components, [of(v.tangent, n) for n, v in enumerate((x, source))])
                for of in (relative, at_zeros)
            )
            cross = add(
                cross,
                by_zeros(
                    components.square(a) - a_squares,
                    components.product(torch.mul, a, b),
                    components.square(b) - b_squares,
                ),
            )
    return HyperDual(y, tangent, cross)


def _sums(members: Members, components: Components, parts: list[Part]) -> tuple[Tensor, Tensor]:
    """sum x_m and sum_ij S_c,ij x_m,i x_m,j over the members of each place."""
    squares = [None if p is None else components.square(p) for p in parts]
    total, total_squares = members.total(*parts), members.total(*squares)
    assert total is not None and total_squares is not None
    return total, total_squares


_REDUCTIONS = {"sum": _sum, "mean": _mean, "amax": _extreme, "amin": _extreme, "prod": _product}


def _index_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """index_reduce is scatter_reduce at an index that is the same along the other dimensions."""
    if x.ndim == 0:
        lifted = x[None], 0, index.reshape(-1), source.reshape(-1)
        return _index_reduce(*lifted, reduce, include_self=include_self).squeeze(0)
    where = index.reshape([-1 if d == dim % x.ndim else 1 for d in range(x.ndim)]).expand(source.shape)
    return aten.scatter_reduce.two(x, dim, where, source, reduce, include_self=include_self)


register(aten.scatter_reduce.two, _scatter_reduce, "selection")
register(aten.index_reduce.default, Composite(_index_reduce))
