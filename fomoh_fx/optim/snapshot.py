"""What one evaluation of a model may change, so that it can be put back: the buffers and the random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Buffers:
    """A module's buffers and tensor attributes, and copies: an evaluation changes one in place, or assigns another."""

    def __init__(self, module: nn.Module) -> None:
        holders = [(m, holder) for m in module.modules() for holder in (m._buffers, vars(m))]
        places = [(m, holder, name, t) for m, holder in holders for name, t in holder.items() if isinstance(t, Tensor)]
        copies = {id(tensor): tensor.clone() for *_, tensor in places}
        self.kept = [(m, holder, name, t, copies[id(t)]) for m, holder, name, t in places]

    def restore(self, unless: Tensor | None = None) -> None:
        """Put them back, or leave them where ``unless``, a 0-dim bool, is True."""
        for _, holder, name, tensor, kept in self.kept:
            if holder.get(name) is not tensor:
                if unless is None or not unless:
                    holder[name] = tensor
            elif torch._debug_has_internal_overlap(tensor) != 1:  # nothing changes an expanded one in place
                tensor.copy_(kept if unless is None else torch.where(unless.to(kept.device), tensor, kept))


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
