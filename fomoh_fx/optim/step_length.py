"""The part of a step to take, when the step is the best one for its own batch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StepLength:
    """Follows the slope that a fresh batch has at the end of the last step s, along s.

    At the minimum along s of the loss over all data this slope is zero on average. s^T H s is the curvature, so the
    step that ends there has the length 1 - slope / s^T H s times that of s: ``part`` goes a little of that way at every
    step. Where batches agree it stays at one; where their noise leads, it falls, as a schedule would make it fall.

    Args:
        rate: how much of the way.
        least: the smallest part; the largest is one.
    """

    def __init__(self, rate: float = 0.1, least: float = 0.01) -> None:
        self.rate, self.least = rate, least
        self.part = torch.ones((), dtype=torch.float64)
        self.curvature = torch.zeros((), dtype=torch.float64)

    def expect(self, curvature: Tensor) -> None:
        """s^T H s of the step that was just made; 0 where there was none."""
        self.curvature = curvature

    def observe(self, slope: Tensor) -> None:
        """The slope along the last step at its end, on another batch."""
        curvature = self.curvature.to(slope)
        excess = torch.where(curvature > 0, slope / curvature, 0).nan_to_num(0, 0, 0).clamp(-1, 1)
        self.part = (self.part.to(slope) * (1 - self.rate * excess)).clamp(self.least, 1)

    def state_dict(self) -> dict[str, Any]:
        """The part and the curvature that is expected."""
        return {"part": self.part, "curvature": self.curvature}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self.part, self.curvature = torch.as_tensor(state["part"]), torch.as_tensor(state["curvature"])
