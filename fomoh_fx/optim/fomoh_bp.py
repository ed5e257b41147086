"""FoMoH-BP: the second-order line search along the gradient, which one backward pass gives."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from fomoh_fx.hyperdual import HyperDual
from fomoh_fx.optim.base import ForwardOptimizer, Options
from fomoh_fx.optim.checks import at_least_zero
from fomoh_fx.optim.fomoh import line_search
from fomoh_fx.optim.gradient import GradientDirections
from fomoh_fx.transform import HyperDualModule


class FoMoHBP(ForwardOptimizer):
    """theta <- theta - lr g / (|v^T H v| + eps) v along v = grad f (equation 2); the only one with a backward pass.

    v is scaled to the norm sqrt(n), n the number of parameters, which random directions have: ``eps`` then means what
    it means for :class:`~fomoh_fx.optim.FoMoH`, and without it the step does not depend on the scale of v. See
    :class:`ForwardOptimizer` for the arguments in common.

    Args:
        eps: added to the absolute curvature, which bounds the step where the loss is straight.
    """

    second_order = "diagonal"
    settings = (*ForwardOptimizer.settings, "eps")

    def __init__(
        self, hd: HyperDualModule, lr: float | Tensor = 0.1, *, eps: float = 1e-6, **options: Unpack[Options]
    ) -> None:
        at_least_zero("eps", eps)
        self.eps = eps
        super().__init__(hd, GradientDirections(hd), lr, **options)

    def coefficients(self, value: HyperDual) -> Tensor:
        return line_search(value, self.eps)
