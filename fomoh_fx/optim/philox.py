"""Philox-2x32-10, a counter-based generator (Salmon, Moraes, Dror, Shaw 2011), as tensor operators.

A number follows from its place and a key alone, so that a compiled program takes them on all cores, which a generator
with a state cannot do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 10
_MULTIPLIER, _WEYL, _WORD = 0xD256D193, 0x9E3779B9, 0xFFFFFFFF


def schedule(key: Tensor) -> Tensor:
    """The keys of the rounds of a key of 32 bits, 0-dim int64: [ROUNDS]."""
    return (key + torch.arange(ROUNDS, device=key.device) * _WEYL) & _WORD


def words(keys: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Two random words of 32 bits for each counter (``low``, ``high``), int64 like the words of the counter."""
    for key in keys.unbind():
        product = low * _MULTIPLIER  # of 64 bits, which wrap around
        low, high = ((product >> 32) ^ key ^ high) & _WORD, product
    return low, high & _WORD


def normals(keys: Tensor, stream: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``2 count`` independent samples of N(0, 1), by Box and Muller.

    Args:
        keys: :func:`schedule` of a key.
        stream: of all streams of that key, 0-dim int64 of 32 bits.
        count: of pairs.
        dtype: of a real number; less than 32 bits are rounded from float32.
    """
    wide = torch.promote_types(dtype, torch.float32)
    both = _stored(keys, stream, count)
    bits = 32 if wide == torch.float64 else 24  # as many as are exact
    whole = (both.to(torch.int64) & _WORD) if bits == 32 else (both >> 8) & 0xFFFFFF
    uniform = (whole.to(wide) + 0.5) * 2.0**-bits  # in (0, 1]
    radius, angle = torch.sqrt(-2 * torch.log(uniform[:count])), uniform[count:] * (2 * math.pi)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)]).to(dtype)


def signs(keys: Tensor, stream: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``64 count`` independent signs, one for each bit; arguments as those of :func:`normals`."""
    bits = torch.arange(32, dtype=torch.int32, device=keys.device)
    highest = _stored(keys, stream, count).unsqueeze(1) << bits
    return ((highest >> 31) | 1).to(dtype).flatten()


def _stored(keys: Tensor, stream: Tensor, count: int) -> Tensor:
    """The words of the first ``count`` counters of a stream: int32 [2 count].

    A change of type is one place at which a program stores what it has, and does not compute it for every use.
    """
    low, high = words(keys, torch.arange(count, device=keys.device), stream)
    return (low | (high << 32)).view(torch.int32)
