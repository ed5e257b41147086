"""Plane solvers that adapt: their caution follows the ratio of actual to predicted decrease of the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fomoh_fx.errors import ArgumentError
from fomoh_fx.optim.checks import at_least_zero


class AdaptiveSolver(ABC):
    """A solver that is told what its steps did. ``caution`` names the one number that it adapts.

    ``damping``, float64 and 0-dim, is what it added to the plane's curvatures for the step that it found last.
    """

    damping: Tensor
    caution: str
    remembers: ClassVar[Sequence[str]] = ("damping",)
    settings: ClassVar[Sequence[str]] = ("least", "most")

    @abstractmethod
    def __call__(self, g: Tensor, h: Tensor) -> Tensor:
        """kappa [K] from the slopes [K] and the curvatures [K, K]."""

    @abstractmethod
    def observe(self, actual: Tensor, predicted: Tensor) -> None:
        """The changes of the loss, negative where it fell; one that is not finite counts as a failure.

        What this does to ``caution`` is undone after a step that tells nothing: one of length zero, one of a batch
        whose loss or derivatives are not finite, or one that predicted less than the rounding of the loss.
        """

    def state_dict(self) -> dict[str, Any]:
        """The number that adapts."""
        return {self.caution: getattr(self, self.caution)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        setattr(self, self.caution, torch.as_tensor(state[self.caution]))


def started(name: str, value: float, least: float, most: float) -> Tensor:
    """The number that adapts, at the start.

    Raises:
        ArgumentError: it or its bounds are no finite numbers above zero, or it is not between them.
    """
    for what, number in (("least", least), ("most", most), (name, value)):
        at_least_zero(what, number)
    if not 0 < least <= value <= most:
        raise ArgumentError(
            f"{name}: expected a number between least={least!r}, which is above 0, and most={most!r}, got {value!r}"
        )
    return torch.tensor(float(value), dtype=torch.float64)


def quality(actual: Tensor, predicted: Tensor) -> Tensor:
    """actual / predicted: 1 for a perfect prediction, NaN where no decrease was predicted."""
    return torch.where(predicted < 0, actual / predicted, torch.nan)


class LevenbergMarquardt(AdaptiveSolver):
    """kappa = -(H + damping diag |H|)^-1 g, damped as much as the last steps ask for (Levenberg 1944, Marquardt 1963).

    Where the actual decrease of the loss is below a quarter of the predicted one the damping grows, to 0.1 at least;
    where it is above three quarters it shrinks. Nothing waits for the device.

    Args:
        damping: at the start.
        growth, decay: the factors by which it grows and shrinks.
        least, most: its bounds.

    Raises:
        ArgumentError: these are not 0 < least <= damping <= most, growth >= 1 and 0 < decay <= 1, all of them finite.
    """

    caution = "damping"
    settings = ("growth", "decay", "least", "most")

    def __init__(
        self, damping: float = 0.1, growth: float = 4.0, decay: float = 0.7, least: float = 1e-4, most: float = 1e4
    ) -> None:
        self.damping = started("damping", damping, least, most)
        at_least_zero("growth", growth)
        at_least_zero("decay", decay)
        if growth < 1 or not 0 < decay <= 1:
            raise ArgumentError(f"growth, decay: expected growth >= 1 and 0 < decay <= 1, got {growth!r} and {decay!r}")
        self.growth, self.decay, self.least, self.most = growth, decay, least, most

    def __call__(self, g: Tensor, h: Tensor) -> Tensor:
        curvature = h.diagonal().abs()
        scale = torch.where(curvature > 0, curvature, 1).rsqrt()
        damped = h * scale.outer(scale) + self.damping.to(h) * torch.eye(len(g), dtype=h.dtype, device=h.device)
        solution, _ = torch.linalg.solve_ex(damped, -g * scale)
        return solution * scale

    def observe(self, actual: Tensor, predicted: Tensor) -> None:
        damping, ratio = self.damping.to(actual), quality(actual, predicted)
        grown = (damping * self.growth).clamp(min=0.1)
        kept = torch.where(ratio > 0.75, damping * self.decay, damping)
        self.damping = torch.where(ratio >= 0.25, kept, grown).clamp(self.least, self.most)
