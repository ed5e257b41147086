"""Confirmed truth: two independent answers that agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    return None


def _reverse(
    function: Callable[..., Tensor], xs: Sequence[Tensor], directions: Sequence[Tensor], tolerance: float
) -> Truth | None:
    try:
        _, tangents, crosses = reverse_over_reverse(function, xs, directions)
    except Exception:  # no derivative of the derivative, or none at all
        return None
    truth = Truth(tangents, crosses, tolerance, "reverse mode")
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
