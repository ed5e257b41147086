"""FoMoH-KD: the hyperplane search, a Newton step inside the plane of K directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from fomoh_fx.errors import ArgumentError
from fomoh_fx.hyperdual import HyperDual
from fomoh_fx.optim.activity import ActivityDirections
from fomoh_fx.optim.base import Options
from fomoh_fx.optim.directions import RandomDirections
from fomoh_fx.optim.plane import PlaneSearch
from fomoh_fx.optim.record import StepRecord
from fomoh_fx.optim.samplers import Sampler
from fomoh_fx.optim.solvers import Solver
from fomoh_fx.optim.step_length import StepLength
from fomoh_fx.perturbation import ActivityGradient
from fomoh_fx.transform import HyperDualModule


class FoMoHKD(PlaneSearch):
    """theta <- theta + lr sum_i kappa_i v_i with kappa = -H^-1 g, H_ij = v_i^T H v_j in the plane (equation 10).

    ``sampler="activity"`` guesses gradients from perturbed activities, with forward passes only. It takes a model
    whose ``transform`` got the loss, and whose values inside have one axis for the samples, usually the first.
    Parameters that act through linear layers, convolutions, embeddings by index, scalings and sums are served; what the
    guess leaves out is told by a warning. Its plane is spanned by
    :class:`~fomoh_fx.optim.activity.ActivityDirections` and always has the curvature ``"ggn"``. The loss is computed
    once more after a step, which is taken back (and counted in :attr:`refused`) where the batch's loss rose by a tenth;
    the damping follows the ratio of actual to predicted decrease. A step that is the best one for
    its own batch goes too far for all others: the part of it that is taken
    (:class:`~fomoh_fx.optim.step_length.StepLength`) follows the slope that the next batch has along it.

    See :class:`ForwardOptimizer` for the arguments in common, :class:`~fomoh_fx.optim.plane.PlaneSearch` for what a
    solver that adapts changes.

    Args:
        lr: which part of the step to take; None for 0.1, or 1 with ``sampler="activity"`` or a solver that adapts.
        directions: K, the dimension of the plane; None for 3, or 2 with ``sampler="activity"``.
        sampler: ``"activity"``, a name in :data:`~fomoh_fx.optim.samplers.SAMPLERS`, or a function like those.
        solver: a name in :data:`~fomoh_fx.optim.solvers.SOLVERS`, or a function of (g, H) like those. None is
            ``"jitter"`` (the paper's), or ``"levenberg_marquardt"`` with ``sampler="activity"``.
        previous_step: whether one of the K directions is the step before, which lets good directions live on. It takes
            two directions or more, and is what ``sampler="activity"`` does anyway.
        seed: of the directions; None takes one from torch's default generator.
        perturbations: with ``sampler="activity"``, how many perturbations of each sample are averaged; None for 4.
    """

    def __init__(
        self,
        hd: HyperDualModule,
        lr: float | Tensor | None = None,
        directions: int | None = None,
        *,
        sampler: str | Sampler = "normal",
        solver: str | Solver | None = None,
        previous_step: bool = False,
        seed: int | None = None,
        perturbations: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        self.length = StepLength() if sampler == "activity" else None
        if sampler == "activity":
            if previous_step:
                raise ArgumentError('previous_step: sampler="activity" has the step before from two directions on')
            gradient = ActivityGradient(hd, 4 if perturbations is None else perturbations)
            guesses = ActivityDirections(gradient, 2 if directions is None else directions, seed)
            super().__init__(
                hd, guesses, 1.0 if lr is None else lr, solver or "levenberg_marquardt", curvature="ggn", **options
            )
        else:
            if perturbations is not None:
                raise ArgumentError(f'perturbations: are for sampler="activity", got {perturbations!r} and {sampler!r}')
            drawn = RandomDirections(3 if directions is None else directions, sampler, seed, previous_step)
            super().__init__(hd, drawn, lr, solver or "jitter", **options)

    def parts(self) -> list[Any]:
        return [*super().parts(), *([] if self.length is None else [self.length])]

    def coefficients(self, value: HyperDual) -> Tensor:
        kappa = super().coefficients(value)
        if self.length is None or not isinstance(self.directions, ActivityDirections):
            return kappa
        if value.tangent.shape[0] > 1:
            self.length.observe(value.tangent[1].double().nan_to_num(0, 0, 0) * self.directions.length.to(kappa))
        return kappa * self.length.part.to(kappa)

    def learn(self, record: StepRecord) -> None:
        super().learn(record)
        if self.length is not None:
            made = ~record.skipped if record.refused is None else ~(record.skipped | record.refused)
            self.length.expect(torch.where(made & ~record.bend.isnan(), record.bend, 0))

    def entries(self) -> dict[str, Any]:
        """With the part of the step that is taken, where that adapts."""
        return {**super().entries(), **({} if self.length is None else {"step_length": self.length.state_dict()})}

    def restore(self, entries: Mapping[str, Any]) -> None:
        super().restore(entries)
        if self.length is not None:
            self.length.load_state_dict(entries["step_length"])
