"""Products and cumulative operators along one dimension of n elements, in log2(n) steps: a balanced tree, or doubling.

Every step is an ordinary operator, so that zeros and masked elements need no special case.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import SymInt, Tensor

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.rules.registry import Composite, register

aten = torch.ops.aten
Combine = Callable[[Tensor, Tensor], Tensor]


def _prod(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return _prod_along(x.reshape(-1), 0, dtype=dtype)


def _prod_along(x: Tensor, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """The product of both halves, until one element is left; of a dynamic length, the last of the running products."""
    x = x if dtype is None else x.to(dtype)
    if x.ndim == 0:
        return x.clone()
    size = x.shape[dim]
    if isinstance(size, SymInt):
        places, running = torch.arange(size, device=x.device), _cumprod(x, dim)
        last = torch.where(_along(dim, places == size - 1, x), running, 0.0).sum(dim, keepdim)
        return last + (torch.ones_like(places).sum() == 0)  # the product of no elements
    if size == 0:
        return torch.ones_like(x.sum(dim, keepdim))
    while size > 1:
        half, odd = divmod(size, 2)
        y = x.narrow(dim, 0, half) * x.narrow(dim, half, half)
        x, size = torch.cat([y, x.narrow(dim, 2 * half, 1)], dim) if odd else y, half + odd
    return x if keepdim else x.squeeze(dim)


def _cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    return _doubled(torch.mul, x if dtype is None else x.to(dtype), dim)


def _logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """At infinity reverse mode has no derivative, as in logsumexp: neither has log(exp(x)) there."""
    if x.is_complex():
        raise UnsupportedOpError(
            "a complex number has many logarithms, and which of them PyTorch returns follows from its order of "
            "summation: write torch.cumsum(x.exp(), dim).log()"
        )
    return _doubled(_logaddexp, torch.where(x == torch.inf, x.exp().log(), x), dim)


def _logaddexp(before: Tensor, x: Tensor) -> Tensor:
    """Without the derivative at two elements that are both masked, which is not a number."""
    return torch.where(before == -torch.inf, x, torch.logaddexp(x, before))


def _doubled(combine: Combine, x: Tensor, dim: int) -> Tensor:
    """Step s combines every element with the one s places before it, s = 1, 2, 4, ..: all runs of 2 s elements."""
    if x.ndim == 0:
        return x.clone()
    size, step = x.shape[dim], 1
    if isinstance(size, SymInt):
        return _doubled_in_a_loop(combine, x, dim)
    while step < size:
        rest = size - step
        x = torch.cat([x.narrow(dim, 0, step), combine(x.narrow(dim, 0, rest), x.narrow(dim, step, rest))], dim)
        step *= 2
    return x


def _doubled_in_a_loop(combine: Combine, x: Tensor, dim: int) -> Tensor:
    """The same where the length, and so the number of steps, is known at the call only."""
    places = torch.arange(x.shape[dim], device=x.device)

    def is_short(step: Tensor, x: Tensor, places: Tensor) -> Tensor:
        return step < places.shape[0]

    def double(step: Tensor, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        before = x.index_select(dim, (places - step).clamp(min=0))
        return step * 2, torch.where(_along(dim, places >= step, x), combine(before, x), x)

    step = torch.ones((), dtype=torch.int64, device=x.device)
    return torch.ops.higher_order.while_loop(is_short, double, (step, x), (places,))[1]


def _along(dim: int, values: Tensor, x: Tensor) -> Tensor:
    return values.view([-1 if d == dim % x.ndim else 1 for d in range(x.ndim)])


register(aten.prod.default, Composite(_prod))
register(aten.prod.dim_int, Composite(_prod_along))
register(aten.cumprod.default, Composite(_cumprod))
register(aten.logcumsumexp.default, Composite(_logcumsumexp))
