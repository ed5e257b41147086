"""Linear operators: every component goes through the operator itself, and second order adds nothing.

y_i = phi(x_i), y_c = phi(x_c), for operators that are jointly linear in the arguments with components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.hyperdual import Components, HyperDual, primal_of
from fomoh_fx.rules.registry import Rule, register
from fomoh_fx.rules.stacking import active_positions, align, axis, batched, bind, primals

aten = torch.ops.aten


def linear(stacked: Callable[..., Any] | None = None) -> Rule:
    """The rule of an operator that is linear in its one active argument.

    Args:
        stacked: ``stacked(op, component, *args, **kwargs)``, the operator applied to components with a leading axis,
            where a form better than vmap's is known; ``args`` are the primals of the arguments.
    """

    def rule(op: Callable[..., Any], components: Components, *args: Any, **kwargs: Any) -> Any:
        plain, options = primals(args, kwargs)
        y = op(*plain, **options)
        (at,) = active_positions(args, kwargs)
        x = args[at] if isinstance(at, int) else kwargs[at]

        def through(component: Tensor | None) -> Any:
            if component is None:
                return None
            if stacked is not None:
                return stacked(op, component, *plain, **options)
            return batched(op, plain, options, {at: component})

        return joined(y, through(x.tangent), through(x.cross))

    rule.kind = "linear"  # type: ignore[attr-defined]
    return rule


def jointly(form: Callable[..., Any], positions: Sequence[int] = (0, 1), kind: str = "linear") -> Rule:
    """The rule of an operator that is linear in several arguments together.

    Args:
        form: ``form(parts, y, *args)`` is one order's components of the output, from those of the arguments at
            ``positions``, None where an argument has none; ``y`` is the output and ``args`` are the primals of all
            arguments of the operator's schema, defaults filled in.
        positions: where the arguments stand in the schema; one of them may be a list of tensors if it is the only one.
    """

    def rule(op: Callable[..., Any], components: Components, *args: Any, **kwargs: Any) -> Any:
        plain, options = primals(args, kwargs)
        y = op(*plain, **options)
        bound = bind(op, args, kwargs)
        others = [a for n, a in enumerate(bound) if n not in positions and isinstance(a, HyperDual)]
        if others:
            raise UnsupportedOpError(
                "an argument in which it is not linear has a derivative, and no rule for that is known"
            )
        operands = [bound[n] for n in positions]
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = list(operands[0])

        def through(order: str) -> Any:
            parts = [getattr(a, order) if isinstance(a, HyperDual) else None for a in operands]
            return None if all(p is None for p in parts) else form(parts, y, *primal_of(bound))

        return joined(y, through("tangent"), through("cross"))

    rule.kind = kind  # type: ignore[attr-defined]
    return rule


def mapped(form: Callable[..., Any]) -> Rule:
    """The rule of an operator that is linear in its first argument: ``form(part, y, *args)`` as in :func:`jointly`."""
    return jointly(lambda parts, y, *args: form(parts[0], y, *args), positions=(0,))


def joined(primal: Any, tangent: Any, cross: Any) -> Any:
    """A HyperDual for each tensor of an output of one or several; what is not floating is a constant."""
    leaves, spec = pytree.tree_flatten(primal)
    tangents = [None] * len(leaves) if tangent is None else pytree.tree_leaves(tangent)
    crosses = [None] * len(leaves) if cross is None else pytree.tree_leaves(cross)
    parts = [
        HyperDual(y, t, c) if isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex()) else y
        for y, t, c in zip(leaves, tangents, crosses, strict=True)
    ]
    return pytree.tree_unflatten(parts, spec)


def constant() -> Rule:
    """The rule of an operator whose derivative is zero wherever it exists (comparisons, rounding, sampling)."""

    def rule(op: Callable[..., Any], components: Components, *args: Any, **kwargs: Any) -> Any:
        plain, options = primals(args, kwargs)
        return op(*plain, **options)

    rule.kind = "constant"  # type: ignore[attr-defined]
    return rule


def refused(reason: str) -> Rule:
    """The rule of an operator that has no derivative, for this reason."""

    def rule(op: Callable[..., Any], components: Components, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedOpError(reason)

    rule.kind = "refused"  # type: ignore[attr-defined]
    return rule


def _dims(dims: Any, x: Tensor) -> list[int]:
    """Dimensions to reduce, in a stack; none given means all."""
    given = [dims] if isinstance(dims, int) else list(dims or range(x.ndim))
    return [axis(d, x) for d in given] if x.ndim else []


def _cast(part: Tensor, y: Tensor, x: Tensor, *_: Any) -> Tensor:
    return part if part.dtype == y.dtype and part.device == y.device else part.to(y.device, y.dtype)


#: What reads memory by strides, and which of its arguments is the offset.
BY_STRIDES = {aten.as_strided.default: 3, aten.as_strided_scatter.default: 4}


def storage_index(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None, stored: Tensor | None = None
) -> tuple[list[int], Tensor]:
    """An as_strided view of ``x`` as an index: the order of its dimensions in storage, and positions in that order.

    A component's layout is its own, so it cannot be viewed through the primal's strides. The storage is that of
    ``stored`` where that is given; sizes are those of ``x``, which the graph knows.
    """
    stored = x if stored is None else stored
    order = sorted(range(x.ndim), key=lambda d: (stored.stride(d), stored.shape[d] == 1), reverse=True)
    if not stored.permute(order).is_contiguous():
        raise UnsupportedOpError("as_strided of a tensor with gaps or overlaps in its storage: index it instead")
    start = 0 if offset is None else offset - stored.storage_offset()
    if start < 0 or start + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) >= max(x.numel(), 1):
        raise UnsupportedOpError("as_strided reaches elements of the storage outside of its argument: index the whole")
    positions = torch.arange(x.numel(), device=x.device)
    return order, aten.as_strided.default(positions, size, stride, start)


def in_storage_order(part: Tensor, order: Sequence[int]) -> Tensor:
    """[K, *shape] -> [K, numel], the elements in the order of the primal's storage."""
    return part.permute(0, *[d + 1 for d in order]).reshape(part.shape[0], -1)


def _as_strided(part: Tensor, y: Tensor, x: Tensor, size: Any, stride: Any, offset: int | None) -> Tensor:
    order, index = storage_index(x, size, stride, offset)
    return aten.index.Tensor(in_storage_order(part, order), [None, index])


def _nansum(part: Tensor, y: Tensor, x: Tensor, dim: Any, keepdim: bool, dtype: Any) -> Tensor:
    dims = _dims(dim, x)
    kept = aten.masked_fill.Scalar(part, x.isnan(), 0.0)
    return kept if not dims else aten.sum.dim_IntList(kept, dims, keepdim, dtype=dtype)


#: Operators that move what they are given and map a stack in one node under vmap.
MOVES = [
    aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.diagonal.default, aten.unfold.default,
    aten.unbind.int, aten.flip.default, aten.roll.default, aten.rot90.default, aten.tril.default, aten.triu.default,
    aten.diag_embed.default, aten.trace.default,
]  # fmt: skip

#: Sums that vmap maps in one node.
SUMS = [aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.cumsum.default]

#: Operators that give each element another place in the same order. A component need not have the primal's layout.
RESHAPES = [
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.squeeze.default,
    aten._reshape_alias.default,
]  # fmt: skip

#: Copies: a component is never changed in place, so it needs none.
COPIES = [
    aten.clone.default, aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default,
    aten._to_copy.default, torch.ops.prims.convert_element_type.default,
]  # fmt: skip

for op in [*MOVES, *SUMS]:
    register(op, linear())
for op in RESHAPES:
    register(op, mapped(lambda part, y, *_: part.reshape(part.shape[0], *y.shape)))
for op in COPIES:
    register(op, mapped(_cast))
register(aten.expand.default, mapped(lambda part, y, x, *_: align(part, x, y.ndim).expand(-1, *y.shape)))
register(aten.repeat.default, mapped(lambda part, y, x, sizes: align(part, x, len(sizes)).repeat(1, *sizes)))
for op in (aten.split.Tensor, aten.unsafe_split.Tensor):  # vmap fixes a dynamic size
    register(op, mapped(lambda part, y, x, size, dim: aten.split.Tensor(part, size, axis(dim, x))))
for op in (aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default):
    register(op, mapped(lambda part, y, x, sizes, dim: aten.split_with_sizes.default(part, sizes, axis(dim, x))))
register(aten.as_strided.default, mapped(_as_strided))
register(aten.nansum.default, mapped(_nansum))
