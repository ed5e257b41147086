"""FGD: forward gradient descent, first order."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from fomoh_fx.hyperdual import HyperDual
from fomoh_fx.optim.base import ForwardOptimizer, Options
from fomoh_fx.optim.directions import RandomDirections
from fomoh_fx.optim.samplers import Sampler
from fomoh_fx.transform import HyperDualModule


class FGD(ForwardOptimizer):
    """theta <- theta - lr (1/n) sum_i g_i v_i over n random directions (Baydin et al. 2022).

    On average the step is gradient descent's. See :class:`ForwardOptimizer` for the arguments in common.

    Args:
        directions: n, how many directions are averaged.
        sampler: a name in :data:`~fomoh_fx.optim.samplers.SAMPLERS`, or a function like those.
        seed: of the directions; None takes one from torch's default generator.
    """

    second_order = None
    default_largest_rise = None

    def __init__(
        self,
        hd: HyperDualModule,
        lr: float | Tensor = 1e-4,
        directions: int = 1,
        *,
        sampler: str | Sampler = "normal",
        seed: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(hd, RandomDirections(directions, sampler, seed), lr, **options)

    def coefficients(self, value: HyperDual) -> Tensor:
        return -value.tangent / value.tangent.shape[0]
