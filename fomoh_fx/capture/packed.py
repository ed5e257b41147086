"""Packed sequences while a model is captured.

The rows of a packed sequence are those places (step, sequence) of the padded one that a mask keeps, and how many they
are is data: rows are chosen and put back by indices. Layers run on the padded form, where a state stays as it is
beyond its sequence's length. The number of sequences is a size, and the number of steps is that of the padded input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fomoh_fx.rules.recurrent import STEPS, layers


@dataclass(frozen=True)
class _Rows:
    """Which places [T, B] are kept, their numbers in order, and for each place the number of its row."""

    kept: Tensor
    places: Tensor
    row_of: Tensor

    def packed(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1).index_select(0, self.places)

    def padded(self, packed: Tensor, value: float = 0.0) -> Tensor:
        """[T, B, ...] with the value where no row belongs."""
        places = packed.index_select(0, self.row_of).unflatten(0, self.kept.shape)
        return torch.where(self.kept.reshape(*self.kept.shape, *[1] * (packed.ndim - 1)), places, value)


#: By the tensor of batch sizes, which every packed sequence that comes from one shares.
_ROWS = WeakIdKeyDictionary()


def _pack(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    x = x.transpose(0, 1) if batch_first else x
    steps, count = x.shape[:2]
    is_sorted = (lengths[1:] <= lengths[:-1]).all() & (lengths[-1] > 0)
    torch._assert_async(is_sorted, "lengths: expected positive numbers in decreasing order (or enforce_sorted=False)")
    torch._assert_async(
        lengths[0] == steps,
        "lengths: a captured model packs an input that is as long as its longest sequence; cut it to that length",
    )
    kept = torch.arange(steps).unsqueeze(1) < lengths
    batch_sizes = kept.sum(1)
    kept = kept.to(x.device)
    flat = kept.flatten()
    rows = _Rows(kept, flat.nonzero().squeeze(1), (flat.cumsum(0) - 1).clamp(min=0))
    _ROWS[batch_sizes] = rows
    return rows.packed(x), batch_sizes


def _pad(
    packed: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    rows = _ROWS[batch_sizes]
    padded = rows.padded(packed, padding_value)
    missing = total_length - padded.shape[0]
    if missing > 0:
        padded = torch.cat([padded, padded.new_full((missing, *padded.shape[1:]), padding_value)])
    return padded.transpose(0, 1) if batch_first else padded, rows.kept.sum(0).to("cpu")


def _recurrent(step: Any, packed: Tensor, batch_sizes: Tensor, state: Any, *options: Any) -> tuple[Tensor, ...]:
    rows = _ROWS[batch_sizes]
    initial: Sequence[Tensor] = [state] if isinstance(state, Tensor) else state
    params, has_biases, num_layers, dropout, train, bidirectional = options
    out, *last = layers(
        step, rows.padded(packed), initial, params, has_biases, num_layers, dropout, train, bidirectional,
        kept=rows.kept,
    )  # fmt: skip
    return rows.packed(out), *last


def _item(batch_sizes: Tensor, at: Any) -> int | Tensor:
    """At the first step every sequence is there: that number is a size, not data."""
    first = isinstance(at, int) and at == 0
    return _ROWS[batch_sizes].kept.shape[1] if first else torch.ops.aten.alias(batch_sizes)[at]


_BODIES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.Tensor.__getitem__: _item,
    torch._pad_packed_sequence: _pad,
    **{getattr(torch, name): partial(_recurrent, step) for name, step in STEPS.items()},
}


def of_packed(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    """The function, or its body where it packs a sequence or takes the batch sizes of a packed one."""
    if function is torch._pack_padded_sequence:
        return _pack
    batch_sizes = args[0 if function is torch.Tensor.__getitem__ else 1] if function in _BODIES else None
    return _BODIES[function] if isinstance(batch_sizes, Tensor) and batch_sizes in _ROWS else function
