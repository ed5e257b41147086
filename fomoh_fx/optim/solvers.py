"""Plane solvers: from the slopes g [K] and the curvatures H [K, K] to the coefficients kappa [K] of the K directions.

A solver is a function of (g, H), both float64 and finite, and may be registered under a name in :data:`SOLVERS`.
``functools.partial`` sets the options of a function, ``solver=partial(saddle_free, floor=1e-3)``; a solver that adapts
is an object, ``solver=TrustRegion(radius=1.0)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fomoh_fx.errors import ArgumentError
from fomoh_fx.optim.adaptive import AdaptiveSolver, LevenbergMarquardt
from fomoh_fx.optim.trust_region import TrustRegion

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


#: By name; an adaptive solver is a class, of which every optimizer gets its own.
SOLVERS: dict[str, Solver | type[AdaptiveSolver]] = {
    "jitter": jitter,
    "saddle_free": saddle_free,
    "levenberg_marquardt": LevenbergMarquardt,
    "trust_region": TrustRegion,
}


def solver_of(solver: str | Solver) -> Solver:
    """The solver of that name, or the function itself.

    Raises:
        ArgumentError: there is no solver of that name, or it is a class and no object of it.
    """
    if isinstance(solver, type):
        raise ArgumentError(
            f"solver: expected an object of {solver.__name__}, {solver.__name__}(..), and not the class"
        )
    if callable(solver):
        return solver
    found = SOLVERS.get(solver) if isinstance(solver, str) else None
    if found is None:
        raise ArgumentError(f"solver: expected one of {tuple(SOLVERS)} or a function, got {solver!r}")
    return found() if isinstance(found, type) else found
