"""Replay: the loss of a batch once more, with the random numbers and the state of the evaluation before it."""

from __future__ import annotations

import torch
from torch import Tensor

from fomoh_fx import lower
from fomoh_fx.capture import Call
from fomoh_fx.optim.directions import Batch
from fomoh_fx.optim.snapshot import RandomState, State
from fomoh_fx.passes.retrace import without_autocast
from fomoh_fx.transform import HyperDualModule


class Replay:
    """Made before the evaluation: dropout then has the same masks, and no state is changed again.

    Where the evaluation was lowered by Inductor its random numbers are other ones: there two replays are compared.
    """

    def __init__(self, hd: HyperDualModule, batch: Batch, state: State) -> None:
        self.hd, self.batch, self.random, self.state = hd, batch, RandomState(hd.module), state

    @property
    def is_alike(self) -> bool:
        """Whether the evaluation drew the same numbers as its replay."""
        return self.hd.lowering is lower.eager or not self.hd.latest.program.draws

    @torch.no_grad()
    def loss(self) -> Tensor:
        """The loss by the captured graph, with the parameters of now and the state of then."""
        program = self.hd.latest.program
        tensors = Call(self.batch.args, self.batch.kwargs, self.batch.targets or ()).tensors
        kept = [self.state.before(what) for what in program.inputs]
        then = [what.value(tensors) if b is None else b for what, b in zip(program.inputs, kept, strict=True)]
        value = next(i for i, out in enumerate(program.outputs) if out.changes is None)
        with self.random.replayed(), without_autocast():
            return program.module(*then)[value]
