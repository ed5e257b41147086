"""Replay: the loss of a batch once more, with the random numbers and the state of the evaluation before it."""

from __future__ import annotations

import torch
from torch import Tensor

from fomoh_fx import lower
from fomoh_fx.optim.snapshot import RandomState, State
from fomoh_fx.passes.retrace import without_autocast
from fomoh_fx.specialization import Evaluation
from fomoh_fx.transform import HyperDualModule


class Replay:
    """Made before the evaluation: dropout then has the same masks, and no state is changed again.

    Where the evaluation was lowered by Inductor its random numbers are other ones: there two replays are compared.
    """

    def __init__(self, hd: HyperDualModule, evaluation: Evaluation, state: State) -> None:
        self.evaluation, self.random, self.state = evaluation, RandomState(hd.module), state

    @property
    def is_alike(self) -> bool:
        """Whether the evaluation drew the same numbers as its replay."""
        evaluated = self.evaluation.specialization
        return evaluated.lowering is lower.eager or not evaluated.program.draws

    @torch.no_grad()
    def loss(self) -> Tensor:
        """The loss by the captured graph alone, with the parameters of now and the state of then."""
        evaluated, tensors = self.evaluation.specialization, self.evaluation.tensors
        then = [self.state.before(what, tensors) for what in evaluated.program.inputs]
        with self.random.replayed(), without_autocast():
            return evaluated.value(*then)
