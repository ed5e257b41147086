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

    An output of several elements is differentiated one element at a time, so keep outputs small. CuDNN's recurrent
    networks and fused attention have no second derivative, so both are switched off.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False), torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in xs]
        y = function(*leaves)
        k = directions[0].shape[0]
        tangents = torch.zeros(k, y.numel(), dtype=y.dtype)
        crosses = torch.zeros(k, k, y.numel(), dtype=y.dtype)
        for e, element in enumerate(y.reshape(-1)):
            gradient = _grad(element, leaves)
            for i in range(k):
                slope = _along(gradient, [d[i] for d in directions])
                tangents[i, e] = slope.detach()
                second = _grad(slope, leaves)
                for j in range(k):
                    crosses[i, j, e] = _along(second, [d[j] for d in directions]).detach()
    return y.detach(), tangents.reshape(k, *y.shape), crosses.reshape(k, k, *y.shape)


def slopes(function: Callable[..., Tensor], xs: Sequence[Tensor], directions: Sequence[Tensor], truth: str) -> Tensor:
    """The tangents alone, by one backward pass for each element of the output or by finite differences."""
    if truth == "difference":
        step = 1e-5
        moved = [
            [[x + h * d_k for x, d_k in zip(xs, d, strict=True)] for h in (step, -step)]
            for d in zip(*directions, strict=True)
        ]
        return torch.stack([(function(*right) - function(*left)) / (2 * step) for right, left in moved]).detach()
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in xs]
        y = function(*leaves)
        gradients = [_grad(element, leaves) for element in y.reshape(-1)]
        found = [[_along(gradient, d) for gradient in gradients] for d in zip(*directions, strict=True)]
        return torch.stack([torch.stack(row) for row in found]).reshape(-1, *y.shape).detach()


def _along(gradient: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
    """<g, d>; PyTorch's gradient of a real function of z = a + bi is df/da + i df/db, so that is Re(conj(g) d)."""
    products = (g.conj() * d if g.is_complex() else g * d for g, d in zip(gradient, direction, strict=True))
    return sum(p.real.sum() if p.is_complex() else p.sum() for p in products)  # type: ignore[return-value]


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
