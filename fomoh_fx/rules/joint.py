"""Operators that are linear in several arguments together: joins, choices and interpolations of tensors.

An argument without a component contributes the symbolic zero: a choice of zero is written as a constant of the
operator, and a missing piece of a join as padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.rules.linear import jointly, mapped
from fomoh_fx.rules.registry import Composite, register
from fomoh_fx.rules.stacking import align, axis, primals

aten = torch.ops.aten
Part = Tensor | None


def padded(part: Tensor, dim: int, before: int, after: int) -> Tensor:
    """The part with zeros before and after it along a dimension of the stack."""
    pads = [0, 0] * (part.ndim - 1 - dim) + [before, after]
    return aten.constant_pad_nd.default(part, pads) if before or after else part


def _cat(parts: list[Part], y: Tensor, tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Pieces without a component become padding of their neighbours."""
    dim = axis(dim, y)
    pieces: list[Tensor] = []
    gaps = [0]  # the zeros before the first piece, then those after each piece
    for part, x in zip(parts, tensors, strict=True):
        if x.ndim != y.ndim:  # cat leaves out empty vectors
            continue
        if part is None:
            gaps[-1] += x.shape[dim - 1]
        else:
            pieces.append(part)
            gaps.append(0)
    pieces = [padded(p, dim, 0 if n else gaps[0], gaps[n + 1]) for n, p in enumerate(pieces)]
    return pieces[0] if len(pieces) == 1 else aten.cat.default(pieces, dim)


def _stack(parts: list[Part], y: Tensor, tensors: Sequence[Tensor], dim: int) -> Tensor:
    dim = axis(dim, y)
    if all(p is not None for p in parts):
        return aten.stack.default(parts, dim)
    raised = [None if p is None else p.unsqueeze(dim) for p in parts]
    return _cat(raised, y, [x.unsqueeze(dim - 1) for x in tensors], dim - 1)


def chosen(condition: Tensor, a: Part, b: Part) -> Part:
    """where(condition, a, b) with symbolic zeros: nothing that is not finite leaks from the side not taken."""
    if a is None and b is None:
        return None
    if b is None:
        return aten.where.ScalarOther(condition, a, 0.0)
    if a is None:
        return aten.where.ScalarSelf(condition, 0.0, b)
    return aten.where.self(condition, a, b)


def _where(parts: list[Part], y: Tensor, condition: Tensor, *branches: Any) -> Part:
    return chosen(
        condition, *(None if p is None else align(p, x, y.ndim) for p, x in zip(parts, branches, strict=True))
    )


def _masked_fill(part: Tensor, y: Tensor, x: Tensor, mask: Tensor, value: Any) -> Tensor:
    return aten.masked_fill.Scalar(align(part, x, y.ndim), mask, 0.0)


def _lerp(op: Any, components: Components, *args: Any) -> HyperDual:
    """y = a + w (b - a): linear in (a, b), bilinear with w."""
    a, b, w = (x if isinstance(x, HyperDual) else HyperDual(x) for x in args)
    y = op(*primals(args, {})[0])

    def aligned(x: HyperDual, order: str) -> Part:
        part = getattr(x, order)
        return None if part is None else align(part, x.primal, y.ndim)

    def through(order: str) -> Part:
        start, end, weight = (aligned(x, order) for x in (a, b, w))
        if start is not None and end is not None:
            ends: Part = op(start, end, w.primal)
        elif start is not None:
            ends = start * (1 - w.primal)
        else:
            ends = None if end is None else end * w.primal
        return add(ends, None if weight is None else weight * (b.primal - a.primal))

    tangent, cross = through("tangent"), None
    if components.second_order is not None:
        cross = through("cross")
        start, end, weight = (aligned(x, "tangent") for x in (a, b, w))
        difference = add(end, None if start is None else -start)
        if weight is not None and difference is not None:
            cross = add(cross, components.product(torch.mul, weight, difference))
    return HyperDual(y, tangent, cross)


def _overwritten(op: Any, components: Components, x: Any, source: Any, *options: Any) -> Any:
    """The first argument gives shape and dtype, the second the values."""
    y = op(*primals((x, source, *options), {})[0])
    if not isinstance(source, HyperDual):
        return y

    def through(part: Part) -> Part:
        return None if part is None else align(part, source.primal, y.ndim).to(y.dtype).expand(-1, *y.shape)

    return HyperDual(y, through(source.tangent), through(source.cross))


register(aten.cat.default, jointly(_cat, (0,)))
register(aten.stack.default, jointly(_stack, (0,)))
register(aten.where.self, jointly(_where, (1, 2)))
register([aten.where.ScalarOther], jointly(lambda parts, y, c, a, b: _where([*parts, None], y, c, a, b), (1,)))
register([aten.where.ScalarSelf], jointly(lambda parts, y, c, a, b: _where([None, *parts], y, c, a, b), (2,)))
register(aten.masked_fill.Scalar, mapped(_masked_fill))
register(aten.masked_fill.Tensor, Composite(lambda x, mask, value: aten.where.self(mask, value.to(x.dtype), x)))
register([aten.lerp.Scalar, aten.lerp.Tensor], _lerp, "bilinear")
register([aten.copy.default, aten.fill.Tensor], _overwritten, "linear")
