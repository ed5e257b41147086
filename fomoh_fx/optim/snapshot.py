"""What one evaluation of a model may change, so that it can be put back: the buffers and the random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Buffers:
    """A module's buffers and copies of them: an evaluation changes one in place, or assigns another."""

    def __init__(self, module: nn.Module) -> None:
        copies = {id(buffer): buffer.clone() for buffer in module.buffers()}
        places = [(m, name, b) for m in module.modules() for name, b in m.named_buffers(recurse=False)]
        self.kept = [(m, name, b, copies[id(b)]) for m, name, b in places]

    def restore(self, unless: Tensor | None = None) -> None:
        """Put the buffers back, or leave them where ``unless``, a 0-dim bool, is True."""
        for module, name, buffer, kept in self.kept:
            if module._buffers[name] is not buffer:
                if unless is None or not unless:
                    module._buffers[name] = buffer
                continue
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
