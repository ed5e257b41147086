"""The gradient as a direction, by one backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.optim.directions import Batch, Directions
from fomoh_fx.optim.samplers import Stacks, scaled, unit_scale
from fomoh_fx.optim.snapshot import RandomState, State
from fomoh_fx.transform import HyperDualModule


class GradientDirections(Directions):
    """One direction: the gradient of the batch's loss, scaled to the norm sqrt(n) that random directions have.

    The backward pass sees the random numbers that the evaluation after it draws, and leaves the state as it is.
    (Inductor draws other numbers than eager PyTorch, so with a compiled module dropout's masks differ.)
    """

    def __init__(self, hd: HyperDualModule) -> None:
        self.hd = hd

    def propose(self, parameters: Mapping[str, Tensor], batch: Batch) -> Stacks:
        one = {name: p.detach().unsqueeze(0) for name, p in parameters.items()}  # of the kind of the gradient
        state = State(self.hd, self.hd.prepare(*batch.args, tangents=one, **batch.keywords))
        random = RandomState(self.hd.module)
        with random.replayed(), torch.enable_grad():
            loss = self.hd.model(*batch.args, **batch.kwargs)
            if self.hd.loss is not None:
                loss = self.hd.loss(loss, *(batch.targets or ()))
            trained = list(parameters.values())
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss, trained, materialize_grads=True)
            else:  # it depends on none of them
                gradients = tuple(map(torch.zeros_like, trained))
        state.restore()
        found = {name: g.detach().unsqueeze(0) for name, g in zip(parameters, gradients, strict=True)}
        return scaled(found, unit_scale(found))

    def state_dict(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        del state
