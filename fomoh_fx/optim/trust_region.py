"""The trust region: the best step of the plane's quadratic model within a radius."""

from __future__ import annotations

import torch
from torch import Tensor

from fomoh_fx.optim.adaptive import AdaptiveSolver, quality, started

#: How often the interval that holds the damping is cut, and into how many parts: float64 has no more digits.
CUTS, PARTS = 11, 64

#: Relative to the largest, what counts as no curvature and no slope: the rounding of an evaluation in float32.
ROUNDING = 1e-7


class TrustRegion(AdaptiveSolver):
    """The minimum of g . kappa + kappa^T H kappa / 2 over ||kappa|| <= radius (Sorensen 1982; More, Sorensen 1983).

    It is kappa = -(H + damping I)^-1 g with the least damping >= 0 that makes H + damping I positive semi-definite and
    the step short enough, found by cutting an interval; where g has no part along the lowest eigenvector of an
    indefinite H (a saddle), that eigenvector fills the step up to the radius. Directions of norm sqrt(n) make the
    radius the root mean square of the parameters' change. It shrinks to a quarter where the actual decrease of the
    loss is below a quarter of the predicted one, and doubles where it is above three quarters and the step has reached
    it (Nocedal, Wright, Numerical Optimization, algorithm 4.1). On CUDA the eigenvalues wait for the device.

    Args:
        radius: at the start.
        least, most: its bounds.

    Raises:
        ArgumentError: these are not 0 < least <= radius <= most, all of them finite.
    """

    caution = "radius"
    remembers = ("radius", "damping", "_reached")

    def __init__(self, radius: float = 0.1, least: float = 1e-12, most: float = 1e3) -> None:
        self.radius = started("radius", radius, least, most)
        self.least, self.most = least, most
        self.damping = torch.zeros((), dtype=torch.float64)
        self._reached = torch.zeros((), dtype=torch.bool)

    def __call__(self, g: Tensor, h: Tensor) -> Tensor:
        radius = self.radius.to(h)
        values, vectors = torch.linalg.eigh(h)
        slopes = vectors.mT @ g
        values = torch.where(values.abs() > ROUNDING * values.abs().amax(), values, 0)
        dead = (values == 0) & (slopes.abs() <= ROUNDING * torch.linalg.vector_norm(slopes))
        slopes = torch.where(dead, 0, slopes)
        newton = _step(values, slopes, torch.zeros_like(radius))
        free = (values[0] >= 0) & (torch.linalg.vector_norm(newton) <= radius)
        damping = _least_damping(values, slopes, radius)
        kappa = torch.where(free, newton, _step(values, slopes, damping))
        missing = (radius.square() - kappa.square().sum()).clamp(min=0).sqrt()
        saddle = (values[0] < 0) & (missing > 1e-6 * radius)
        lowest = torch.where(slopes[0] > 0, -missing, missing) * torch.eye(len(g), dtype=h.dtype, device=h.device)[0]
        self.damping, self._reached = torch.where(free, 0, damping), ~free
        return vectors @ (kappa + torch.where(saddle, lowest, 0))

    def observe(self, actual: Tensor, predicted: Tensor) -> None:
        radius, ratio = self.radius.to(actual), quality(actual, predicted)
        grown = torch.where((ratio > 0.75) & self._reached.to(ratio.device), 2 * radius, radius)
        self.radius = torch.where(ratio >= 0.25, grown, radius / 4).clamp(self.least, self.most)


def _least_damping(values: Tensor, slopes: Tensor, radius: Tensor) -> Tensor:
    """The least that leaves no negative curvature and no step longer than the radius, from above."""
    low = (-values[0]).clamp(min=0)
    high = low + torch.linalg.vector_norm(slopes) / radius
    parts = torch.linspace(0, 1, PARTS + 1, dtype=values.dtype, device=values.device)
    for _ in range(CUTS):
        tried = torch.lerp(low, high, parts)
        long = torch.linalg.vector_norm(_step(values, slopes, tried.unsqueeze(1)), dim=1) > radius
        low, high = torch.where(long, tried, low).amax(), torch.where(long, high, tried).amin()
    return high


def _step(values: Tensor, slopes: Tensor, damping: Tensor) -> Tensor:
    """-slopes / (values + damping), 0 where a slope is 0."""
    return torch.where(slopes == 0, 0, -slopes / (values + damping))
