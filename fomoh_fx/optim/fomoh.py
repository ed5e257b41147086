"""FoMoH: a second-order line search along random directions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fomoh_fx.hyperdual import HyperDual
from fomoh_fx.optim.base import ForwardOptimizer, at_least_zero
from fomoh_fx.optim.directions import RandomDirections, Sampler
from fomoh_fx.transform import HyperDualModule


class FoMoH(ForwardOptimizer):
    """theta <- theta - lr (1/n) sum_i g_i / (|v_i^T H v_i| + eps) v_i over n random directions (equation 1).

    See :class:`ForwardOptimizer` for the arguments in common.

    Args:
        directions: n, how many directions are averaged.
        sampler: ``"normal"``, ``"rademacher"``, ``"sphere"``, ``"orthogonal"``, or a function like those.
        eps: added to the absolute curvature, which bounds the step where the loss is straight.
        seed: of the directions; None takes one from torch's default generator.
    """

    second_order = "diagonal"

    def __init__(
        self,
        hd: HyperDualModule,
        lr: float | Tensor = 0.1,
        directions: int = 1,
        *,
        sampler: str | Sampler = "normal",
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        seed: int | None = None,
        params: Iterable[Any] | None = None,
    ) -> None:
        at_least_zero("eps", eps)
        self.eps = eps
        source = RandomDirections(directions, sampler, seed)
        super().__init__(hd, source, params=params, lr=lr, weight_decay=weight_decay)

    def coefficients(self, value: HyperDual) -> Tensor:
        return -value.tangent / (value.cross.abs() + self.eps) / self.directions.count
