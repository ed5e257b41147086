"""Products and cumulative operators along one dimension of n elements, in log2(n) steps: a balanced tree, or doubling.

Every step is an ordinary product, so that zeros need no special case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.rules.joint import padded
from fomoh_fx.rules.reduction import Part, each, from_right, reduction
from fomoh_fx.rules.registry import Composite, register

aten = torch.ops.aten


def _length(x: Tensor, dim: int) -> int:
    size = x.shape[dim]
    if not isinstance(size, int):
        raise UnsupportedOpError("its rule needs a dimension of fixed size, not a dynamic one")
    return size


def _prod(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return _prod_along(x.reshape(-1), 0, dtype=dtype)


def _prod_along(x: Tensor, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """The product of both halves, until one element is left."""
    x = x if dtype is None else x.to(dtype)
    if x.ndim == 0:
        return x.clone()
    size = _length(x, dim)
    if size == 0:
        return torch.ones_like(x.sum(dim, keepdim))
    while size > 1:
        half, odd = divmod(size, 2)
        y = x.narrow(dim, 0, half) * x.narrow(dim, half, half)
        x, size = torch.cat([y, x.narrow(dim, 2 * half, 1)], dim) if odd else y, half + odd
    return x if keepdim else x.squeeze(dim)


def _cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Step s multiplies every element by the one s places before it, s = 1, 2, 4, ..: all products of 2 s elements."""
    x = x if dtype is None else x.to(dtype)
    if x.ndim == 0:
        return x.clone()
    size, step = _length(x, dim), 1
    while step < size:
        rest = size - step
        x = torch.cat([x.narrow(dim, 0, step), x.narrow(dim, step, rest) * x.narrow(dim, 0, rest)], dim)
        step *= 2
    return x


def _logcumsumexp(components: Components, x: HyperDual, y: Tensor, dim: int) -> HyperDual:
    """By doubling, where each step is :func:`_logaddexp` of every element and the one ``step`` places before it."""
    (dim,) = from_right(y, dim)
    size, step = _length(y, dim), 1
    while step < size:

        def at(start: int, x: HyperDual = x, rest: int = size - step) -> HyperDual:
            return HyperDual(x.primal.narrow(dim, start, rest), *each(lambda p: p.narrow(dim, start, rest), x))

        def after(old: Part, new: Part, step: int = step) -> Part:
            """The first ``step`` elements as they are, and the new ones."""
            if old is None:
                return None if new is None else padded(new, new.ndim + dim, step, 0)
            assert new is not None  # has every component that the old ones have
            return torch.cat([old.narrow(dim, 0, step), new], dim)

        z = _logaddexp(components, at(0), at(step))
        x = HyperDual(*map(after, (x.primal, x.tangent, x.cross), (z.primal, z.tangent, z.cross)))
        step *= 2
    return HyperDual(y, x.tangent, x.cross)


def _logaddexp(components: Components, a: HyperDual, b: HyperDual) -> HyperDual:
    """With s = exp(a - z) and t = exp(b - z), which are zero where z is -inf:

    z_i = s a_i + t b_i and z_c = s a_c + t b_c + s t sum_ij S_c,ij (a_i - b_i) (a_j - b_j).
    """
    z = torch.logaddexp(a.primal, b.primal)
    finite = aten.where.ScalarOther(z != -torch.inf, z, 0.0)
    s, t = (a.primal - finite).exp(), (b.primal - finite).exp()
    tangent = None if a.tangent is None else s * a.tangent + t * b.tangent
    cross = None if a.cross is None else s * a.cross + t * b.cross
    if a.tangent is not None and components.second_order is not None:
        cross = add(cross, s * t * components.square(a.tangent - b.tangent))
    return HyperDual(z, tangent, cross)


register(aten.prod.default, Composite(_prod))
register(aten.prod.dim_int, Composite(_prod_along))
register(aten.cumprod.default, Composite(_cumprod))
register(aten.logcumsumexp.default, reduction(_logcumsumexp))
