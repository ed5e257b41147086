"""FoMoH: a second-order line search along random directions."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from fomoh_fx.hyperdual import HyperDual
from fomoh_fx.optim.base import ForwardOptimizer, Options
from fomoh_fx.optim.checks import at_least_zero
from fomoh_fx.optim.directions import RandomDirections
from fomoh_fx.optim.samplers import Sampler
from fomoh_fx.transform import HyperDualModule


class FoMoH(ForwardOptimizer):
    """theta <- theta - lr (1/n) sum_i g_i / (|v_i^T H v_i| + eps) v_i over n random directions (equation 1).

    See :class:`ForwardOptimizer` for the arguments in common.

    Args:
        directions: n, how many directions are averaged.
        sampler: a name in :data:`~fomoh_fx.optim.samplers.SAMPLERS`, or a function like those.
        eps: added to the absolute curvature, which bounds the step where the loss is straight.
        seed: of the directions; None takes one from torch's default generator.
    """

    second_order = "diagonal"
    settings = (*ForwardOptimizer.settings, "eps")

    def __init__(
        self,
        hd: HyperDualModule,
        lr: float | Tensor = 0.1,
        directions: int = 1,
        *,
        sampler: str | Sampler = "normal",
        eps: float = 1e-6,
        seed: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        at_least_zero("eps", eps)
        self.eps = eps
        super().__init__(hd, RandomDirections(directions, sampler, seed), lr, **options)

    def coefficients(self, value: HyperDual) -> Tensor:
        return line_search(value, self.eps)


def line_search(value: HyperDual, eps: float) -> Tensor:
    """kappa_i = -g_i / (|v_i^T H v_i| + eps) / K: [K]."""
    return -value.tangent / (value.cross.abs() + eps) / value.tangent.shape[0]
