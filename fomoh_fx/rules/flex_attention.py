"""Flexible attention by its mathematics: softmax(where(mask_mod, score_mod(scale q k^T), -inf)) v, densely."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NEGATIVE_INFINITY = -math.inf


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Callable[..., Tensor], block_mask: Sequence[Any],
    scale: float, kernel_options: Any = None, score_mod_other_buffers: Sequence[Any] = (),
    mask_mod_other_buffers: Sequence[Any] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, the log-sum-exp of each row in base 2, and its largest score; rows that are fully masked give zero.

    The arguments are those of the operator ``flex_attention``. Scores are float32, or float64 for float64 queries.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (_heads_repeated(x, group).expand(query.shape[0], *(-1,) * 3) for x in (key, value))
    precision = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = (query.to(precision) @ key.to(precision).transpose(-2, -1)) * scale
    places = [torch.arange(n, device=scores.device) for n in scores.shape]
    scores = _everywhere(score_mod, (scores,), places, score_mod_other_buffers).to(precision)
    kept = _everywhere(block_mask[-1], (), places, mask_mod_other_buffers)
    scores = torch.where(kept, scores, NEGATIVE_INFINITY)
    empty = (scores == NEGATIVE_INFINITY).all(-1, keepdim=True)
    safe = scores.masked_fill(empty, 0.0)  # so that a row without any score has a derivative, zero
    weights = safe.softmax(-1).masked_fill(empty, 0.0)
    logarithm = (safe.logsumexp(-1) / math.log(2)).masked_fill(empty.squeeze(-1), NEGATIVE_INFINITY)
    return (weights @ value.to(precision)).to(query.dtype), logarithm, scores.amax(-1)


def _heads_repeated(x: Tensor, group: int) -> Tensor:
    """Every head of keys or values serves a group of query heads."""
    if group == 1:
        return x
    return x.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2)


class _IndexByTensors(TorchFunctionMode):
    """Makes ``bias[head, row - column]`` a gather: under vmap, indexing by a tensor would ask for its value."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            places = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
            if all(isinstance(place, Tensor) for place in places):
                return torch.ops.aten.index.Tensor(args[0], places)
        return func(*args, **(kwargs or {}))


def _everywhere(
    function: Callable[..., Tensor], first: tuple[Tensor, ...], places: Sequence[Tensor], others: Any
) -> Tensor:
    """``function(*first, batch, head, row, column, *others)``, written for one element, at all of them."""
    for axis in (3, 2, 1, 0):
        along = [0 if axis == i else None for i in range(4)]
        function = torch.vmap(function, in_dims=(*(0 for _ in first), *along, *(None for _ in others)))
    with _IndexByTensors():
        return function(*first, *places, *others)
