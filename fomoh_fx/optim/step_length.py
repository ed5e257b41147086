"""The part of a step to take, when the step is the best one for its own batch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StepLength:
    """Follows the slope that a fresh batch has at the end of the last step s, along s.

    At the minimum along s of the loss over all data this slope is zero on average. s^T H s is the curvature, so the
    step that ends there has the length 1 - slope / s^T H s times that of s. ``best``, a running average of it, is one
    where batches agree and falls where their noise leads, as a schedule would make it fall. What is best for one step
    is too short in the long run: noise that one step makes, later ones remove. So the part to take is its square root.

    Args:
        rate: how much of ``best`` is new at every step.
        least: the smallest ``best``; the largest is one.
    """

    remembers = ("best", "curvature")
    settings = ("rate", "least")

    def __init__(self, rate: float = 0.1, least: float = 1e-4) -> None:
        self.rate, self.least = rate, least
        self.best = torch.ones((), dtype=torch.float64)
        self.curvature = torch.zeros((), dtype=torch.float64)

    @property
    def part(self) -> Tensor:
        """The part to take."""
        return self.best.sqrt()

    def expect(self, curvature: Tensor) -> None:
        """s^T H s of the step that was just made; 0 where there was none."""
        self.curvature = curvature

    def observe(self, slope: Tensor) -> None:
        """The slope along the last step at its end, on another batch."""
        curvature, best = self.curvature.to(slope), self.best.to(slope)
        excess = torch.where(curvature > 0, slope / curvature, 0).nan_to_num(0, 0, 0).clamp(-1, 2)
        ideal = best.sqrt() * (1 - excess)
        self.best = torch.where(curvature > 0, best.lerp(ideal, self.rate), best).clamp(self.least, 1)

    def state_dict(self) -> dict[str, Any]:
        """What is remembered."""
        return {"best": self.best, "curvature": self.curvature}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self.best, self.curvature = torch.as_tensor(state["best"]), torch.as_tensor(state["curvature"])
