"""Bags of embeddings: y[b] is the sum, the mean or the maximum of the rows w[i] over the indices i of bag b.

A sum may weigh its rows, y[b] = sum_n p[n] w[i[n]], and is bilinear then. Indices equal to ``padding_idx`` are left
out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.rules.indexing import gathered, refuse_scaled
from fomoh_fx.rules.registry import register
from fomoh_fx.rules.stacking import primals

aten = torch.ops.aten
Part = Tensor | None
SUM, MEAN, MAX = 0, 1, 2


def _bags(indices: Tensor, offsets: Tensor, include_last: bool) -> Tensor:
    """Which bag each index is in; bag b begins at offsets[b]."""
    starts = offsets[:-1] if include_last else offsets
    places = torch.arange(indices.shape[0], dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(starts.contiguous(), places, right=True) - 1


def _embedding_bag(
    op: Any, components: Components, weight: Any, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool = False,
    mode: int = SUM, sparse: bool = False, sample_weights: Any = None, include_last: bool = False, padding: int = -1,
) -> Any:  # fmt: skip
    refuse_scaled(scale_grad_by_freq)
    arguments = (weight, indices, offsets, False, mode, sparse, sample_weights, include_last, padding)
    y, *rest = op(*primals(arguments, {})[0])
    w, p = (a if isinstance(a, HyperDual) else HyperDual(a) for a in (weight, sample_weights))
    bags = _bags(indices, offsets, include_last)
    counted = (indices != padding) if padding >= 0 else torch.ones_like(indices, dtype=torch.bool)
    count = aten.index_add.default(
        torch.zeros(y.shape[:1], dtype=torch.int64, device=y.device), 0, bags, counted.long()
    )

    def total(rows: Part) -> Part:
        """The sum of the rows of each bag, of every component."""
        if rows is None:
            return None
        rows = aten.where.ScalarOther(counted.unsqueeze(-1), rows, 0.0) if padding >= 0 else rows
        return aten.index_add.default(rows.new_zeros((rows.shape[0], *y.shape)), 1, bags, rows)

    def rows(part: Tensor) -> Tensor:
        return aten.index_select.default(part, 1, indices)

    def weighed(part: Part) -> Part:
        if part is None or p.primal is None:
            return None if part is None else rows(part)
        return rows(part) * p.primal.unsqueeze(-1)

    def weighing(part: Part) -> Part:
        return None if part is None else part.unsqueeze(-1) * w.primal.index_select(0, indices)

    def first(w_part: Part, p_part: Part) -> Part:
        if mode == MAX:
            found = None if w_part is None else gathered(w_part, 0, rest[-1])
            return None if found is None else aten.where.ScalarOther((count > 0).unsqueeze(-1), found, 0.0)
        summed = total(add(weighed(w_part), weighing(p_part)))
        return summed if summed is None or mode == SUM else summed / count.clamp(min=1).unsqueeze(-1)

    tangent, cross = first(w.tangent, p.tangent), None
    if components.second_order is not None:
        cross = first(w.cross, p.cross)
        if w.tangent is not None and p.tangent is not None:
            pairs = components.product(torch.mul, rows(w.tangent), p.tangent.unsqueeze(-1))
            cross = add(cross, total(pairs))
    return HyperDual(y, tangent, cross), *rest


register([aten._embedding_bag.default, aten._embedding_bag_forward_only.default], _embedding_bag, "bilinear")
