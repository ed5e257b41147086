"""FGD: forward gradient descent, first order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fomoh_fx.hyperdual import HyperDual
from fomoh_fx.optim.base import ForwardOptimizer
from fomoh_fx.optim.directions import RandomDirections, Sampler
from fomoh_fx.transform import HyperDualModule


class FGD(ForwardOptimizer):
    """theta <- theta - lr (1/n) sum_i g_i v_i over n random directions (Baydin et al. 2022).

    On average the step is gradient descent's. See :class:`ForwardOptimizer` for the arguments in common.

    Args:
        directions: n, how many directions are averaged.
        sampler: ``"normal"``, ``"rademacher"``, ``"sphere"``, ``"orthogonal"``, or a function like those.
        seed: of the directions; None takes one from torch's default generator.
    """

    second_order = None

    def __init__(
        self,
        hd: HyperDualModule,
        lr: float | Tensor = 1e-4,
        directions: int = 1,
        *,
        sampler: str | Sampler = "normal",
        weight_decay: float = 0.0,
        seed: int | None = None,
        params: Iterable[Any] | None = None,
    ) -> None:
        source = RandomDirections(directions, sampler, seed)
        super().__init__(hd, source, params=params, lr=lr, weight_decay=weight_decay)

    def coefficients(self, value: HyperDual) -> Tensor:
        return -value.tangent / self.directions.count
