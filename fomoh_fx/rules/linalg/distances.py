"""Distances between points."""

from __future__ import annotations

import torch
from torch import Tensor

from fomoh_fx.rules.registry import Composite, register

aten = torch.ops.aten


def _p_distance(difference: Tensor, p: float) -> Tensor:
    if 0 in difference.shape:  # PyTorch's norm of order infinity refuses no points as it does no coordinates
        return difference.sum(-1)
    return aten.linalg_vector_norm.default(difference, p, [-1])


def _cdist(x: Tensor, w: Tensor, p: float, compute_mode: int | None) -> Tensor:
    return _p_distance(x.unsqueeze(-2) - w.unsqueeze(-3), p)


def pairs_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows i and j of x, i < j, in order; of a dynamic number of rows, too."""
    n = x.shape[0]
    each, pairs = (torch.arange(count, device=x.device) for count in (n, n * (n - 1) // 2))
    before = each * (2 * n - each - 1) // 2  # how many pairs have a smaller i
    i = torch.searchsorted(before, pairs, right=True) - 1
    return i, pairs - before.index_select(0, i) + i + 1


def _pdist(x: Tensor, p: float = 2.0) -> Tensor:
    rows, columns = pairs_of(x)
    return _p_distance(x.index_select(0, rows) - x.index_select(0, columns), p)


register(aten._cdist_forward.default, Composite(_cdist))
register(aten._pdist_forward.default, Composite(_pdist))
register(aten._euclidean_dist.default, Composite(lambda x, w: _cdist(x, w, 2.0, None)))
