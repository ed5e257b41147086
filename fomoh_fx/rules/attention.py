"""Scaled dot-product attention by its mathematics: softmax(scale q k^T + mask) v.

The fused kernels have no second derivative, and the composite needs none of them. A row whose elements are all masked
gives zeros, as in PyTorch's own form. Half types are computed in float32 inside, as PyTorch does. Long sequences (of a
length that is not dynamic, and without dropout) take a few rows of queries at a time, exactly, so that the memory of
every component grows with their length and not with its square.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fomoh_fx.passes.retrace import in_body
from fomoh_fx.rules.precision import wide
from fomoh_fx.rules.registry import Composite, register

aten = torch.ops.aten

#: The most scores of one head that are computed at once; of more, so many rows at a time (benchmarks/README.md).
MOST_SCORES = 2**20
ROWS = 128


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, causal_from: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """scale q k^T + mask [.., L, S], and the mask as what is added: -inf where a boolean one is False.

    ``causal_from`` are the places [L] of the queries where none sees a later key.
    """
    scale = 1 / torch.sym_sqrt(query.shape[-1]) if scale is None else scale
    if causal_from is not None:
        mask = causal_from.unsqueeze(1) >= torch.arange(key.shape[-2], device=query.device)
    if mask is not None and mask.dtype == torch.bool:
        zeros = torch.zeros_like(mask, dtype=query.dtype)
        mask = zeros.masked_fill(mask.logical_not(), -torch.inf)
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    return (scores, None) if mask is None else (scores + mask, mask)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, causal_from: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The attention's output, and its scores."""
    dtype, (query, key, value) = value.dtype, map(wide, (query, key, value))
    scores, mask = _scores(query, key, mask, causal_from, scale)
    softmax = (
        aten._softmax.default(scores, -1, False)
        if mask is None or causal_from is not None
        else aten._safe_softmax.default(scores, -1)
    )
    weights = aten.native_dropout.default(softmax, dropout_p, True)[0] if dropout_p > 0 else softmax
    return torch.matmul(weights, value).to(dtype), scores


def _attend_by_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None,
    with_logarithm: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The output, and logsumexp of the scores if asked for, one part of the rows after the other in one body."""
    length = query.shape[-2]
    count = -(-length // ROWS)

    def parts(x: Tensor) -> Tensor:
        """[.., L, D] -> [count, .., ROWS, D], with rows of zeros where there are no more."""
        x = aten.constant_pad_nd.default(x, [0, 0, 0, count * ROWS - length])
        return x.unflatten(-2, (count, ROWS)).movedim(-3, 0)

    def joined(x: Tensor) -> Tensor:
        return x.movedim(0, -3).flatten(-3, -2).narrow(-2, 0, length)

    def body(query: Tensor, places: Tensor, *rest: Tensor) -> list[Tensor]:
        """``rest`` is the part of a mask that has these rows, key, value, and any other mask."""
        own, (key, value, *other) = rest[: len(own_rows)], rest[len(own_rows) :]
        mask = next(iter((*own, *other)), None)
        output, scores = _attend(query, key, value, mask, 0.0, places if is_causal else None, scale)
        return [output, torch.logsumexp(scores, -1, keepdim=True)] if with_logarithm else [output]

    own_rows = [mask] if mask is not None and mask.ndim > 1 and mask.shape[-2] != 1 else []
    for_all = [mask] if mask is not None and not own_rows else []
    places = torch.arange(count * ROWS, device=query.device).reshape(count, ROWS)
    by_part = [parts(query), places, *map(parts, own_rows)]
    output, *logarithm = map(joined, torch.ops.higher_order.map_impl(in_body(body), by_part, [key, value, *for_all]))
    return output, logarithm[0].squeeze(-1) if with_logarithm else None


def _repeated(x: Tensor, times: int) -> Tensor:
    """[.., H, S, D] -> [.., times * H, S, D], each head as often as there are queries for it."""
    *batch, heads, length, size = x.shape
    return x.unsqueeze(-3).expand(*batch, heads, times, length, size).reshape(*batch, heads * times, length, size)


def _computed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, with_logarithm: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The output, and logsumexp of the scores if asked for, in float32 for half types."""
    rows, columns = query.shape[-2], key.shape[-2]
    is_static = isinstance(rows, int) and isinstance(columns, int)
    if is_static and rows > ROWS and rows * columns > MOST_SCORES and not dropout_p:  # a body draws nothing
        return _attend_by_rows(query, key, value, mask, is_causal, scale, with_logarithm)
    places = torch.arange(rows, device=query.device) if is_causal else None
    output, scores = _attend(query, key, value, mask, dropout_p, places, scale)
    return output, torch.logsumexp(scores, -1) if with_logarithm else None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        heads = query.shape[-3]
        key, value = (x if x.shape[-3] == heads else _repeated(x, heads // x.shape[-3]) for x in (key, value))
    return _computed(query, key, value, attn_mask, dropout_p, is_causal, scale, False)[0]


def _flash_attention_for_cpu(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return _computed(query, key, value, attn_mask, dropout_p, is_causal, scale, True)


register(aten.scaled_dot_product_attention.default, Composite(_attention))
register(aten._scaled_dot_product_flash_attention_for_cpu.default, Composite(_flash_attention_for_cpu))
