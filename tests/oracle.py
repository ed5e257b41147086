"""The truth that every derivative is compared with: reverse-over-reverse, and central finite differences.

Nested ``torch.func.jvp`` is not used: it is silently wrong at second order for several operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def reverse_over_reverse(
    function: Callable[..., Tensor], xs: Sequence[Tensor], directions: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, tangents ``[K, *shape]`` and crosses ``[K, K, *shape]`` of a real function along stacked directions.

    An output of several elements is differentiated one element at a time, so keep outputs small.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in xs]
        y = function(*leaves)
        k = directions[0].shape[0]
        tangents = torch.zeros(k, y.numel(), dtype=y.dtype)
        crosses = torch.zeros(k, k, y.numel(), dtype=y.dtype)
        for e, element in enumerate(y.reshape(-1)):
            gradient = _grad(element, leaves)
            for i in range(k):
                slope = sum((g * d[i]).sum() for g, d in zip(gradient, directions, strict=True))
                tangents[i, e] = slope.detach()
                second = _grad(slope, leaves)
                for j in range(k):
                    crosses[i, j, e] = sum((g * d[j]).sum() for g, d in zip(second, directions, strict=True)).detach()
    return y.detach(), tangents.reshape(k, *y.shape), crosses.reshape(k, k, *y.shape)


def _grad(y: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    if not y.requires_grad:
        return [torch.zeros_like(x) for x in xs]
    found = torch.autograd.grad(y, xs, create_graph=True, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, xs, strict=True)]


def finite_differences(
    function: Callable[..., Tensor], xs: Sequence[Tensor], directions: Sequence[Tensor], step: float = 1e-4
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by central differences in float64: errors of about step^2 and 1e-16 / step^2."""

    def at(*moves: tuple[int, float]) -> Tensor:
        moved = [x + sum(h * d[i] for i, h in moves) for x, d in zip(xs, directions, strict=True)]
        with torch.no_grad():
            return function(*moved)

    y = at((0, 0.0))
    k = directions[0].shape[0]
    tangents = torch.stack([(at((i, step)) - at((i, -step))) / (2 * step) for i in range(k)])
    rows = []
    for i in range(k):
        row = []
        for j in range(k):
            corners = [s * t * at((i, s * step), (j, t * step)) for s in (1, -1) for t in (1, -1)]
            row.append(sum(corners) / (4 * step**2))
        rows.append(torch.stack(row))
    return y, tangents, torch.stack(rows)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / max(||expected||, 1): norm-wise, absolute where the truth vanishes."""
    return float((actual - expected).norm() / expected.norm().clamp_min(1.0))
