"""Replay: the loss of a batch once more, with the random numbers and the buffers of the evaluation before it."""

from __future__ import annotations

import torch
from torch import Tensor

from fomoh_fx.optim.directions import Batch
from fomoh_fx.transform import HyperDualModule


class Replay:
    """Made before the evaluation: dropout then has the same masks, and buffers are changed once, by the evaluation.

    Where the evaluation was lowered by Inductor its random numbers are other ones, so there the masks differ.
    """

    def __init__(self, hd: HyperDualModule, batch: Batch) -> None:
        self.hd, self.batch = hd, batch
        self.devices = sorted({p.device.index for p in hd.module.parameters() if p.device.type == "cuda"})
        self.state = torch.get_rng_state()
        self.cuda_states = [torch.cuda.get_rng_state(device) for device in self.devices]
        self.buffers = [b.clone() for b in hd.module.buffers()]

    @torch.no_grad()
    def loss(self) -> Tensor:
        """The loss with the parameters of now and the buffers of then."""
        now = [b.clone() for b in self.hd.module.buffers()]
        self._set(self.buffers)
        try:
            with torch.random.fork_rng(self.devices):
                torch.set_rng_state(self.state)
                for device, state in zip(self.devices, self.cuda_states, strict=True):
                    torch.cuda.set_rng_state(state, device)
                output = self.hd.model(*self.batch.args, **self.batch.kwargs)
                return output if self.hd.loss is None else self.hd.loss(output, *self.batch.targets)
        finally:
            self._set(now)

    def _set(self, values: list[Tensor]) -> None:
        for b, value in zip(self.hd.module.buffers(), values, strict=True):
            b.copy_(value)
