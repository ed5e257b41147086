"""FoMoH-KD: the hyperplane search, a Newton step inside the plane of K directions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fomoh_fx.hyperdual import HyperDual
from fomoh_fx.optim.base import ForwardOptimizer
from fomoh_fx.optim.directions import RandomDirections, Sampler
from fomoh_fx.optim.solvers import Solver, solver_of
from fomoh_fx.transform import HyperDualModule


class FoMoHKD(ForwardOptimizer):
    """theta <- theta + lr sum_i kappa_i v_i with kappa = -H^-1 g, H_ij = v_i^T H v_j in the plane (equation 10).

    See :class:`ForwardOptimizer` for the arguments in common.

    Args:
        directions: K, the dimension of the plane.
        sampler: ``"normal"``, ``"rademacher"``, ``"sphere"``, ``"orthogonal"``, or a function like those.
        solver: ``"jitter"`` (the paper's), ``"saddle_free"``, or a function of (g, H): see
            :mod:`fomoh_fx.optim.solvers`.
        previous_step: whether one of the K directions is the step before, which lets good directions live on.
        seed: of the directions; None takes one from torch's default generator.
    """

    second_order = "plane"

    def __init__(
        self,
        hd: HyperDualModule,
        lr: float | Tensor = 0.1,
        directions: int = 3,
        *,
        sampler: str | Sampler = "normal",
        solver: str | Solver = "jitter",
        previous_step: bool = False,
        weight_decay: float = 0.0,
        seed: int | None = None,
        params: Iterable[Any] | None = None,
    ) -> None:
        self.solver = solver_of(solver)
        source = RandomDirections(directions, sampler, seed, previous_step)
        super().__init__(hd, source, params=params, lr=lr, weight_decay=weight_decay)

    def coefficients(self, value: HyperDual) -> Tensor:
        g, h = value.tangent.double(), value.hessian().double()
        return self.solver(g.nan_to_num(0, 0, 0), h.nan_to_num(0, 0, 0))
