"""Newton's method: the plane of all unit vectors."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from fomoh_fx.optim.base import Options
from fomoh_fx.optim.directions import RandomDirections
from fomoh_fx.optim.plane import PlaneSearch
from fomoh_fx.optim.solvers import Solver
from fomoh_fx.transform import HyperDualModule


class Newton(PlaneSearch):
    """theta <- theta - lr H^-1 grad f: the hyperplane search where the plane is the whole space, K = n unit vectors.

    One step takes 1 + n + n (n + 1) / 2 components of the loss and n^2 numbers of directions: for small n. See
    :class:`ForwardOptimizer` for the arguments in common, :class:`~fomoh_fx.optim.plane.PlaneSearch` for the solvers.
    """

    def __init__(
        self,
        hd: HyperDualModule,
        lr: float | Tensor = 1.0,
        *,
        solver: str | Solver = "jitter",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(hd, RandomDirections(None, "coordinate", seed=0), lr, solver, **options)
