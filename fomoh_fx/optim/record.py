"""What one step of an optimizer was: its slopes and curvatures, and what was predicted of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class StepRecord:
    """One step theta + sum_i part_i v_i, as tensors where the loss is; reading a number of them waits for the device.

    ``loss`` is the one before the step, ``actual`` what the step changed of it on the same batch with the same random
    numbers (before it was taken back where it was, and without weight decay, which is no part of the step), None where
    nothing asked for it. ``slopes`` [K] are v_i . grad f; ``curvature`` is [K, K] for a plane, [K] for a diagonal, None
    at first order; ``part`` [K] is what was taken of each direction, NaN where groups have different rates: nothing is
    predicted then. ``damping`` is the solver's, None where it has none. ``skipped``: something was not finite.
    ``rounding`` is the last digit of the loss in its dtype. ``refused``: the step was taken back.
    """

    loss: Tensor
    slopes: Tensor
    curvature: Tensor | None
    part: Tensor
    damping: Tensor | None
    skipped: Tensor
    rounding: Tensor
    actual: Tensor | None = None
    refused: Tensor | None = None

    @property
    def eigenvalues(self) -> Tensor | None:
        """Of the plane's Hessian, ascending; of a diagonal its entries, ascending."""
        if self.curvature is None:
            return None
        return torch.linalg.eigvalsh(self.curvature) if self.curvature.dim() == 2 else self.curvature.sort().values

    @property
    def bend(self) -> Tensor:
        """part^T H part, what is left out between the directions of a diagonal counting as zero."""
        if self.curvature is None:
            return torch.zeros_like(self.loss)
        h = self.curvature if self.curvature.dim() == 2 else self.curvature.diag()
        return self.part @ h @ self.part

    @property
    def predicted(self) -> Tensor:
        """The change of the loss that the slopes and curvatures predict: g . part + part^T H part / 2."""
        return self.part @ self.slopes + self.bend / 2

    @property
    def tells(self) -> Tensor:
        """Whether actual and predicted change tell how good the prediction was.

        Not where nothing was predicted, or no more than rounding leaves unknown: of four digits that may be a quarter.
        A rise that no rounding explains tells that the prediction was bad all the same.
        """
        assert self.actual is not None
        rises = ~(self.actual <= (self.rounding * self.loss.abs()).sqrt())  # True for NaN
        known = (self.predicted.abs() > 4 * self.rounding) | (rises & ~self.predicted.isnan())
        return known & self.loss.isfinite()

    @property
    def after(self) -> Tensor | None:
        """The loss after the step, before the weights decayed."""
        return None if self.actual is None else self.loss + self.actual


pytree.register_dataclass(StepRecord)
