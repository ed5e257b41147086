"""What one evaluation of a model may change, so that it can be put back: the buffers and the random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Buffers:
    """Copies of a module's buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.kept = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def restore(self, unless: Tensor | None = None) -> None:
        """Put the buffers back, or leave them where ``unless``, a 0-dim bool, is True."""
        for buffer, kept in self.kept:
            buffer.copy_(kept if unless is None else torch.where(unless.to(kept.device), buffer, kept))


class RandomState:
    """The state of torch's default generators, on the CPU and on the module's devices."""

    def __init__(self, module: nn.Module) -> None:
        self.devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the same numbers as from here, and go on afterwards as if nothing had been drawn."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
