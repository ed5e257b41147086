"""FoMoH-KD: the hyperplane search, a Newton step inside the plane of K directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import HyperDual
from fomoh_fx.optim.activity import ActivityDirections
from fomoh_fx.optim.base import ForwardOptimizer
from fomoh_fx.optim.directions import Batch, RandomDirections, Sampler, Stacks
from fomoh_fx.optim.replay import Replay
from fomoh_fx.optim.solvers import LevenbergMarquardt, Solver, solver_of
from fomoh_fx.optim.step_length import StepLength
from fomoh_fx.perturbation import ActivityGradient
from fomoh_fx.transform import Curvature, HyperDualModule


class FoMoHKD(ForwardOptimizer):
    """theta <- theta + lr sum_i kappa_i v_i with kappa = -H^-1 g, H_ij = v_i^T H v_j in the plane (equation 10).

    ``sampler="activity"`` guesses gradients from perturbed activities, with forward passes only. It takes a model
    whose ``transform`` got the loss, and whose values inside have one axis for the samples, usually the first. Its
    plane is spanned by :class:`~fomoh_fx.optim.activity.ActivityDirections` and always has the curvature ``"ggn"``.
    The loss is computed once more after a step, which is taken back (and counted in :attr:`refused`) where the batch's
    loss rose by a tenth; the damping follows the ratio of actual to predicted decrease. A step that is the best one for
    its own batch goes too far for all others: the part of it that is taken
    (:class:`~fomoh_fx.optim.step_length.StepLength`) follows the slope that the next batch has along it.

    See :class:`ForwardOptimizer` for the arguments in common.

    Args:
        lr: which part of the step to take; None for 0.1, or 1 with ``sampler="activity"``.
        directions: K, the dimension of the plane; None for 3, or 2 with ``sampler="activity"``.
        sampler: ``"normal"``, ``"rademacher"``, ``"sphere"``, ``"orthogonal"``, a function like those, or
            ``"activity"``.
        solver: ``"jitter"`` (the paper's), ``"saddle_free"``, or a function of (g, H): see
            :mod:`fomoh_fx.optim.solvers`. None is ``"jitter"``, or with ``sampler="activity"`` a
            :class:`~fomoh_fx.optim.solvers.LevenbergMarquardt`.
        previous_step: whether one of the K directions is the step before, which lets good directions live on.
        seed: of the directions; None takes one from torch's default generator.
        perturbations: with ``sampler="activity"``, how many perturbations of each sample are averaged.
    """

    second_order = "plane"

    def __init__(
        self,
        hd: HyperDualModule,
        lr: float | Tensor | None = None,
        directions: int | None = None,
        *,
        sampler: str | Sampler = "normal",
        solver: str | Solver | None = None,
        previous_step: bool = False,
        weight_decay: float = 0.0,
        seed: int | None = None,
        params: Iterable[Any] | None = None,
        perturbations: int = 4,
    ) -> None:
        source: RandomDirections
        curvature: Curvature | None
        if sampler == "activity":
            gradient = ActivityGradient(hd, perturbations)
            source = ActivityDirections(gradient, 2 if directions is None else directions, seed)
            self.solver: Solver = LevenbergMarquardt() if solver is None else solver_of(solver)
            lr, curvature = 1.0 if lr is None else lr, "ggn"
        else:
            source = RandomDirections(3 if directions is None else directions, sampler, seed, previous_step)
            self.solver = solver_of("jitter" if solver is None else solver)
            lr, curvature = 0.1 if lr is None else lr, None
        self.judges = isinstance(self.solver, LevenbergMarquardt)
        self.length = StepLength() if sampler == "activity" else None
        self._refused = torch.zeros((), dtype=torch.int64)
        super().__init__(hd, source, params=params, lr=lr, weight_decay=weight_decay, curvature=curvature)

    def coefficients(self, value: HyperDual) -> Tensor:
        g, h = value.tangent.double(), value.hessian().double()
        g, h = g.nan_to_num(0, 0, 0), h.nan_to_num(0, 0, 0)
        if not isinstance(self.directions, ActivityDirections) or self.length is None:
            return self.solver(g, h)
        if self.directions.count > 1:
            self.length.observe(g[1] * self.directions.length.to(g))
        return self.solver(g, h) * self.length.part.to(g)

    def evaluate(self, directions: Stacks, batch: Batch, targets: Sequence[Any] | None) -> HyperDual:
        self._replay = Replay(self.hd, batch) if self.judges else None
        return super().evaluate(directions, batch, targets)

    def accepts(self, batch: Batch, value: HyperDual, kappa: Tensor) -> Tensor:
        """Whether the batch's loss did not rise by a tenth; the damping follows the decrease."""
        assert self._replay is not None and isinstance(self.solver, LevenbergMarquardt)
        loss, after = value.primal.double(), self._replay.loss().double()
        g, h, part = value.tangent.double(), value.hessian().double(), self.param_groups[0]["lr"] * kappa
        curvature = part @ h @ part
        self.solver.observe(after - loss, part @ g + curvature / 2)
        stays = after <= loss + 0.1 * loss.abs()
        self._refused = self._refused.to(loss.device) + ~stays
        if self.length is not None:
            self.length.expect(torch.where(stays, curvature, 0))
        return stays

    @property
    def refused(self) -> int:
        """How many steps were taken back so far; reading it waits for the device."""
        return int(self._refused)

    def state_dict(self) -> dict[str, Any]:
        """With the damping and the part of the step that is taken, where those adapt."""
        state = super().state_dict()
        if isinstance(self.solver, LevenbergMarquardt):
            state.update(damping=self.solver.damping, refused=self._refused)
        if self.length is not None:
            state["length"] = self.length.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if isinstance(self.solver, LevenbergMarquardt):
            self.solver.damping = torch.as_tensor(state_dict["damping"])
            self._refused = torch.as_tensor(state_dict["refused"])
        if self.length is not None:
            self.length.load_state_dict(state_dict["length"])
