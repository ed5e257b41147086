"""Plane solvers: from the slopes g [K] and the curvatures H [K, K] to the coefficients kappa [K] of the K directions.

A solver is a function of (g, H), both float64 and finite, and may be registered under a name in :data:`SOLVERS`.
``functools.partial`` sets its options: ``solver=partial(saddle_free, floor=1e-3)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fomoh_fx.errors import ArgumentError

Solver = Callable[[Tensor, Tensor], Tensor]


def jitter(g: Tensor, h: Tensor, amount: float = 1e-5) -> Tensor:
    """The Newton step of the plane, kappa = -H^-1 g, with jitter on the diagonal where H is singular.

    H counts as singular where its condition number exceeds ``1 / amount`` once every direction is scaled to the
    curvature 1 (or -1); the jitter is then ``amount`` times H's largest entry in that scale. Nothing waits for the
    device.
    """
    curvature = h.diagonal().abs()
    scale = torch.where(curvature > 0, curvature, 1).rsqrt()
    scaled = h * scale.outer(scale)
    inverse, info = torch.linalg.inv_ex(scaled)
    condition = torch.linalg.matrix_norm(scaled, 1) * torch.linalg.matrix_norm(inverse, 1)
    largest = scaled.abs().amax()
    added = amount * torch.where(largest > 0, largest, 1 / amount)  # no curvature at all: a gradient step
    regular = (info == 0) & (condition < 1 / amount)  # False for NaN
    solvable = scaled + torch.where(regular, 0, added) * torch.eye(len(g), dtype=h.dtype, device=h.device)
    solution, _ = torch.linalg.solve_ex(solvable, -g * scale)
    return solution * scale


def saddle_free(g: Tensor, h: Tensor, floor: float = 1e-5) -> Tensor:
    """kappa = -|H|^-1 g, |H| with H's eigenvalues replaced by their absolute values: never uphill.

    Absolute eigenvalues below ``floor`` times the largest are raised to it. On CUDA the decomposition waits for the
    device.
    """
    values, vectors = torch.linalg.eigh(h)
    absolute = values.abs()
    largest = absolute.amax()
    least = torch.where(largest > 0, floor * largest, 1)
    return -vectors @ ((vectors.mT @ g) / torch.maximum(absolute, least))


class LevenbergMarquardt:
    """kappa = -(H + damping diag H)^-1 g, damped as much as the last steps ask for (Levenberg 1944, Marquardt 1963).

    After a step, :meth:`observe` compares the actual decrease of the loss with the one that the plane predicted:
    below a quarter of it the damping grows, to 0.1 at least; above three quarters it shrinks. Nothing waits for the
    device.

    Args:
        damping: at the start.
        growth, decay: the factors by which it grows and shrinks.
        least, most: its bounds.
    """

    def __init__(
        self, damping: float = 0.1, growth: float = 4.0, decay: float = 0.7, least: float = 1e-4, most: float = 1e4
    ) -> None:
        self.damping = torch.tensor(damping, dtype=torch.float64)
        self.growth, self.decay, self.least, self.most = growth, decay, least, most

    def __call__(self, g: Tensor, h: Tensor) -> Tensor:
        curvature = h.diagonal().abs()
        scale = torch.where(curvature > 0, curvature, 1).rsqrt()
        damped = h * scale.outer(scale) + self.damping.to(h) * torch.eye(len(g), dtype=h.dtype, device=h.device)
        solution, _ = torch.linalg.solve_ex(damped, -g * scale)
        return solution * scale

    def observe(self, actual: Tensor, predicted: Tensor) -> None:
        """The changes of the loss, negative where it fell; one that is not finite counts as a failure."""
        damping = self.damping.to(actual)
        ratio = torch.where(predicted < 0, actual / predicted, torch.nan)
        grown = (damping * self.growth).clamp(min=0.1)
        kept = torch.where(ratio > 0.75, damping * self.decay, damping)
        self.damping = torch.where(ratio >= 0.25, kept, grown).clamp(self.least, self.most)


SOLVERS: dict[str, Solver] = {
    "jitter": jitter,
    "saddle_free": saddle_free,
}


def solver_of(solver: str | Solver) -> Solver:
    """The solver of that name, or the function itself.

    Raises:
        ArgumentError: there is no solver of that name.
    """
    if callable(solver):
        return solver
    if solver not in SOLVERS:
        raise ArgumentError(f"solver: expected one of {tuple(SOLVERS)} or a function, got {solver!r}")
    return SOLVERS[solver]
