"""Scaled dot-product attention by its mathematics: softmax(scale q k^T + mask) v.

The fused kernels have no second derivative, and the composite needs none of them. A row whose elements are all masked
gives zeros, as in PyTorch's own form. Products keep the type of their factors and are summed wider inside.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fomoh_fx.rules.precision import wide
from fomoh_fx.rules.registry import Composite, register

aten = torch.ops.aten


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """scale q k^T + mask [.., L, S], and the mask as what is added: -inf where a boolean one is False."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        zeros = torch.zeros_like(mask, dtype=query.dtype)
        mask = zeros.masked_fill(mask.logical_not(), -torch.inf)
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    return (scores, None) if mask is None else (scores + mask, mask)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The attention's output, and its scores."""
    scores, mask = _scores(query, key, mask, is_causal, scale)
    softmax = (
        aten._softmax.default(scores, -1, False)
        if mask is None or is_causal
        else aten._safe_softmax.default(scores, -1)
    )
    weights = aten.native_dropout.default(softmax, dropout_p, True)[0] if dropout_p > 0 else softmax
    return torch.matmul(weights, value), scores


def _repeated(x: Tensor, times: int) -> Tensor:
    """[.., H, S, D] -> [.., times * H, S, D], each head as often as there are queries for it."""
    *batch, heads, length, size = x.shape
    return x.unsqueeze(-3).expand(*batch, heads, times, length, size).reshape(*batch, heads * times, length, size)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        heads = query.shape[-3]
        key, value = (x if x.shape[-3] == heads else _repeated(x, heads // x.shape[-3]) for x in (key, value))
    return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale)[0]


def _flash_attention_for_cpu(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and logsumexp of the scores, in float32 for half types."""
    output, scores = _attend(query, key, value, attn_mask, dropout_p, is_causal, scale)
    return output, torch.logsumexp(wide(scores), -1)


register(aten.scaled_dot_product_attention.default, Composite(_attention))
register(aten._scaled_dot_product_flash_attention_for_cpu.default, Composite(_flash_attention_for_cpu))
