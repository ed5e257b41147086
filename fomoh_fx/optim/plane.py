"""What the hyperplane searches share: a plane solver, and what it learns from the steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from fomoh_fx.errors import ArgumentError
from fomoh_fx.hyperdual import HyperDual
from fomoh_fx.optim.adaptive import AdaptiveSolver
from fomoh_fx.optim.base import ForwardOptimizer, Options
from fomoh_fx.optim.directions import Directions
from fomoh_fx.optim.record import StepRecord
from fomoh_fx.optim.solvers import Solver, solver_of
from fomoh_fx.transform import Curvature, HyperDualModule


class PlaneSearch(ForwardOptimizer):
    """theta <- theta + lr sum_i kappa_i v_i with kappa from a plane solver, by g and H_ij = v_i^T H v_j.

    A solver that adapts learns from every step that is looked at again and tells whether the prediction was good
    (:attr:`~fomoh_fx.optim.StepRecord.tells`), in place of the factor by which other solvers' steps become shorter.
    Where groups have different rates nothing is predicted: its damping or radius then stays as it is, and the factor
    makes steps shorter. See :class:`ForwardOptimizer` for the other arguments.

    Args:
        lr: which part of the step to take; None for 1 with a solver that adapts, 0.1 with others.
        solver: a name in :data:`~fomoh_fx.optim.solvers.SOLVERS`, or a function of (g, H) like those.
    """

    second_order = "plane"
    settings = (*ForwardOptimizer.settings, "solver")

    def __init__(
        self,
        hd: HyperDualModule,
        directions: Directions,
        lr: float | Tensor | None,
        solver: str | Solver,
        curvature: Curvature | None = None,
        **options: Unpack[Options],
    ) -> None:
        self.solver = solver_of(solver)
        if lr is None:
            lr = 1.0 if isinstance(self.solver, AdaptiveSolver) else 0.1
        super().__init__(hd, directions, lr, curvature, **options)

    def coefficients(self, value: HyperDual) -> Tensor:
        g, h = value.tangent.double(), value.hessian().double()
        kappa = self.solver(g.nan_to_num(0, 0, 0), h.nan_to_num(0, 0, 0))  # a step that is not finite is skipped anyway
        if not isinstance(kappa, Tensor) or kappa.shape != g.shape:
            what = f"the shape {tuple(kappa.shape)}" if isinstance(kappa, Tensor) else repr(kappa)
            raise ArgumentError(f"solver: expected a tensor of the shape {tuple(g.shape)} from (g, H), got {what}")
        return kappa

    def parts(self) -> list[Any]:
        return [*super().parts(), self.solver]

    def damping(self) -> Tensor | None:
        return self.solver.damping if isinstance(self.solver, AdaptiveSolver) else None

    def learn(self, record: StepRecord) -> None:
        if not isinstance(self.solver, AdaptiveSolver):
            super().learn(record)
            return
        if record.refused is not None:
            leaves_the_plane = record.part.isnan().any()  # groups have rates of their own
            super().learn(replace(record, refused=record.refused & leaves_the_plane))
        if record.actual is not None:
            before = getattr(self.solver, self.solver.caution)
            self.solver.observe(record.actual, record.predicted)
            adapted = getattr(self.solver, self.solver.caution)
            setattr(self.solver, self.solver.caution, torch.where(record.tells, adapted, before.to(adapted)))

    def _kind(self) -> str:
        adapts = f" and the solver {type(self.solver).__name__}" if isinstance(self.solver, AdaptiveSolver) else ""
        return super()._kind() + adapts

    def entries(self) -> dict[str, Any]:
        """With what the solver has learned, where it adapts."""
        solver = {"solver": self.solver.state_dict()} if isinstance(self.solver, AdaptiveSolver) else {}
        return {**super().entries(), **solver}

    def restore(self, entries: Mapping[str, Any]) -> None:
        super().restore(entries)
        if isinstance(self.solver, AdaptiveSolver):
            self.solver.load_state_dict(entries["solver"])
