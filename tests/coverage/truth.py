"""Confirmed truth: two independent answers that agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle import finite_differences, relative_error, reverse_over_reverse

STEPS = (1e-4, 3e-5)


@dataclass
class Truth:
    """The tangents [K] and the crosses [K, K] of a real function, and to what they can be trusted."""

    tangents: Tensor
    crosses: Tensor
    tolerance: float
    source: str

    def errors(self, tangents: Tensor, crosses: Tensor) -> tuple[float, float]:
        """The relative errors of other tangents and crosses."""
        return _error(tangents, self.tangents), _error(crosses, self.crosses)

    @property
    def finite(self) -> bool:
        return bool(self.tangents.isfinite().all() and self.crosses.isfinite().all())

    def confirms(self, other: Truth) -> bool:
        """Slopes to 1e-4, curvatures to 1e-3: a second difference loses twice the digits."""
        slopes, curvatures = self.errors(other.tangents, other.crosses)
        return slopes <= 1e-4 and curvatures <= 1e-3


def confirmed_truth(
    function: Callable[..., Tensor],
    xs: Sequence[Tensor],
    directions: Sequence[Tensor],
    tolerance: float,
    differences: bool = True,
) -> Truth | None:
    """Reverse-over-reverse where finite differences agree with it or have no value, differences where two steps agree.

    ``tolerance`` is reverse mode's own; in less than double precision, and without ``differences``, it stands alone.
    """
    reverse = _reverse(function, xs, directions, tolerance)
    if tolerance > 1e-8 or not differences:  # a difference of rounded values says nothing
        return reverse
    coarse = _differences(function, xs, directions, STEPS[0])
    if reverse is not None and (coarse is None or coarse.confirms(reverse)):
        return reverse
    fine = _differences(function, xs, directions, STEPS[1])
    if reverse is not None and fine is not None and fine.confirms(reverse):
        return reverse
    if coarse is not None and fine is not None and coarse.confirms(fine):
        return fine
    near = None if reverse is None else _near(function, xs, directions)
    return reverse if near is not None and near.confirms(reverse) else None  # type: ignore[arg-type]


def noise(truth: Truth, function: Callable[..., Tensor], xs: Sequence[Tensor], directions: Sequence[Tensor]) -> float:
    """How far reverse mode moves when its inputs are rounded once more, the largest of a few times; else nothing."""
    if truth.source != "reverse mode":
        return 0.0
    generator = torch.Generator().manual_seed(0)
    moved = [0.0]
    for _ in range(3):
        rounding = [torch.rand(x.shape, generator=generator, dtype=torch.float64) for x in xs]
        near = [x * (1 + 2 * torch.finfo(x.dtype).eps * u).to(x.dtype) for x, u in zip(xs, rounding, strict=True)]
        other = _reverse(function, near, directions, truth.tolerance)
        moved += [] if other is None else truth.errors(other.tangents, other.crosses)
    return max(moved)


def _reverse(
    function: Callable[..., Tensor], xs: Sequence[Tensor], directions: Sequence[Tensor], tolerance: float
) -> Truth | None:
    try:
        if not function(*(x.detach().clone().requires_grad_() for x in xs)).requires_grad:
            return None  # it reads numbers off its inputs, or is constant: differences know
        _, tangents, crosses = reverse_over_reverse(function, xs, directions)
    except Exception:  # no derivative of the derivative, or none at all
        return None
    truth = Truth(tangents, crosses, tolerance, "reverse mode")
    return truth if truth.finite else None


def _near(function: Callable[..., Tensor], xs: Sequence[Tensor], directions: Sequence[Tensor]) -> Truth | None:
    """First differences of the value and of reverse mode's first derivative: for a curvature that varies quickly."""
    step = 1e-6

    def at(h: float, i: int) -> list[Tensor]:
        return [x + h * d[i] for x, d in zip(xs, directions, strict=True)]

    def slopes(h: float, i: int) -> Tensor:
        points = [x.requires_grad_() for x in at(h, i)]
        found = torch.autograd.grad(function(*points), points, allow_unused=True)
        gradient = [torch.zeros_like(x) if g is None else g for g, x in zip(found, points, strict=True)]
        products = [
            [(g.conj() * v[j]).real.sum() if g.is_complex() else (g * v[j]).sum() for j in range(len(v))]
            for g, v in zip(gradient, directions, strict=True)
        ]
        return torch.tensor(products, dtype=torch.float64).sum(0)

    count = range(len(directions[0]))
    try:
        with torch.no_grad():
            tangents = [(function(*at(step, i)) - function(*at(-step, i))) / (2 * step) for i in count]
        crosses = [(slopes(step, i) - slopes(-step, i)) / (2 * step) for i in count]
    except Exception:
        return None
    truth = Truth(torch.stack(tangents), torch.stack(crosses), 1e-3, "differences of slopes")
    return truth if truth.finite else None


def _differences(
    function: Callable[..., Tensor], xs: Sequence[Tensor], directions: Sequence[Tensor], step: float
) -> Truth | None:
    try:
        _, tangents, crosses = finite_differences(function, xs, directions, step)
    except Exception:
        return None
    truth = Truth(tangents, crosses, 1e-3, "differences")
    return truth if truth.finite else None


def _error(actual: Tensor, expected: Tensor) -> float:
    error = relative_error(actual, expected)
    return error if error == error else float("inf")
