"""Reading and writing at indices: linear in the values, constant in the indices.

Writing is linear in the tensor written to and in the source together. Where only the source has a component, that
component is written into an accumulator of zeros; where only the target has one, zero is written as a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.rules.joint import padded
from fomoh_fx.rules.linear import in_storage_order, jointly, mapped, storage_index
from fomoh_fx.rules.registry import Composite, Rule, register
from fomoh_fx.rules.stacking import align, axis
from fomoh_fx.sizes import known

aten = torch.ops.aten
Part = Tensor | None


def over_stack(index: Tensor, count: int) -> Tensor:
    """The same index for each of ``count`` components; one without dimensions counts as a vector."""
    return index.reshape(1, *index.shape or (1,)).expand(count, *index.shape or (1,))


def as_vector(part: Tensor) -> Tensor:
    """Components of a value without dimensions as components of a vector: [K] -> [K, 1]."""
    return part if part.ndim > 1 else part.unsqueeze(-1)


def gathered(part: Tensor, dim: int, index: Tensor) -> Tensor:
    """``x.gather(dim, index)`` of every component."""
    values = as_vector(part)
    where = over_stack(index, part.shape[0])
    return aten.gather.default(values, dim % (values.ndim - 1) + 1, where).reshape(part.shape[0], *index.shape)


def accumulator(part: Tensor, x: Tensor) -> Tensor:
    """Zeros for the components of ``x``, to write those of a source into."""
    return torch.zeros((part.shape[0], *x.shape), dtype=part.dtype, device=part.device)


# Advanced indexing: x[i, :, j] with tensors i and j that broadcast together.


def _index_dims(indices: Sequence[Tensor | None]) -> tuple[int, int, bool]:
    """How many dimensions of x the indices consume, how many those of the result are, and whether they come first."""
    given = [n for n, i in enumerate(indices) if i is not None]
    tensors = [i for i in indices if i is not None]
    masks = [t.dtype in (torch.bool, torch.uint8) for t in tensors]
    consumed = sum(t.ndim if mask else 1 for t, mask in zip(tensors, masks, strict=True))
    made = max(1 if mask else t.ndim for t, mask in zip(tensors, masks, strict=True))
    return consumed, made, given != list(range(given[0], given[-1] + 1))


def _index(part: Tensor, y: Tensor, x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """The stack is one more leading dimension that is not indexed."""
    _, made, first = _index_dims(indices)
    out = aten.index.Tensor(part, [None, *indices])
    return out.movedim(made, 0) if first else out


def _index_put(
    parts: list[Part], y: Tensor, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool, *_: Any
) -> Tensor:
    part, source = parts
    if source is None:
        assert part is not None
        if accumulate:
            return part
        zero = torch.zeros((), dtype=part.dtype, device=part.device)
        return aten.index_put.default(part, [None, *indices], zero)
    part = accumulator(source, x) if part is None else part
    consumed, made, first = _index_dims(indices)
    source = align(source, values, x.ndim - consumed + made)
    source = source.movedim(0, made) if first else source
    return aten.index_put.default(part, [None, *indices], source, accumulate)


def _index_select(part: Tensor, y: Tensor, x: Tensor, dim: int, index: Tensor) -> Tensor:
    return aten.index_select.default(as_vector(part), axis(dim, x), index).reshape(part.shape[0], *y.shape)


def _take(part: Tensor, y: Tensor, x: Tensor, index: Tensor) -> Tensor:
    return aten.index.Tensor(part.reshape(part.shape[0], -1), [None, index])


def _put(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    flat = aten.index_put.default(x.reshape(-1), [index.reshape(-1)], source.reshape(-1), accumulate)
    return flat.reshape(x.shape)


def refuse_scaled(scale_grad_by_freq: bool) -> None:
    """A gradient scaled by how often a row occurs is no derivative."""
    if scale_grad_by_freq:
        raise UnsupportedOpError("scale_grad_by_freq=True scales gradients, which is no derivative: leave it out")


def _embedding(
    part: Tensor, y: Tensor, weight: Tensor, indices: Tensor, padding: int, scale_grad_by_freq: bool, sparse: bool
) -> Tensor:
    """Rows of the weight's components; the padding row has no derivative, as in reverse mode."""
    refuse_scaled(scale_grad_by_freq)
    rows = aten.index.Tensor(part, [None, indices])
    return rows if padding < 0 else aten.masked_fill.Scalar(rows, (indices == padding).unsqueeze(-1), 0.0)


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The n-th place where the mask holds takes the n-th element of the source."""
    x, mask = torch.broadcast_tensors(x, mask)
    place = (mask.reshape(-1).cumsum(0) - 1).clamp(min=0).reshape(mask.shape)
    if guard_or_false(source.numel() == 0):  # a size that is data is taken for positive: index says so if it is not
        return x.clone()
    return aten.where.self(mask, aten.index.Tensor(source.reshape(-1), [place]), x)


def _masked_select(x: Tensor, mask: Tensor) -> Tensor:
    x, mask = torch.broadcast_tensors(x, mask)
    if x.ndim == 0:
        x, mask = x.reshape(1), mask.reshape(1)
    return aten.index.Tensor(x, list(mask.nonzero().unbind(1)))


register([aten.index.Tensor, aten._unsafe_index.Tensor], mapped(_index))
register([aten.index_put.default, aten._unsafe_index_put.default], jointly(_index_put, (0, 2)))
register(aten.index_select.default, mapped(_index_select))
register(aten.gather.default, mapped(lambda part, y, x, dim, index, *_: gathered(part, dim, index)))
register(aten.take.default, mapped(_take))
register(aten.put.default, Composite(_put))
register(aten.embedding.default, mapped(_embedding))
register(aten.masked_scatter.default, Composite(_masked_scatter))
register(aten.masked_select.default, Composite(_masked_select))


# Scattering along one dimension: y[index[n], ..] = source[n, ..] or += source[n, ..].


def _scatter(parts: list[Part], y: Tensor, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    part, values = parts
    if values is None:
        assert part is not None
        return _scatter_value(part, y, x, dim, index)
    base = as_vector(accumulator(values, x) if part is None else part)
    where = over_stack(index, base.shape[0])
    return aten.scatter.src(base, axis(dim, x), where, as_vector(values)).reshape(base.shape[0], *y.shape)


def _scatter_value(part: Tensor, y: Tensor, x: Tensor, dim: int, index: Tensor, *_: Any) -> Tensor:
    where = over_stack(index, part.shape[0])
    return aten.scatter.value(as_vector(part), axis(dim, x), where, 0.0).reshape(part.shape[0], *y.shape)


def scattered(part: Part, values: Part, x: Tensor, dim: int, index: Tensor) -> Part:
    """``x.scatter_add(dim, index, source)`` of every component, on symbolic zeros too."""
    if values is None:
        return part
    base = as_vector(accumulator(values, x) if part is None else part)
    where = over_stack(index, base.shape[0])
    return aten.scatter_add.default(base, axis(dim, x), where, as_vector(values)).reshape(base.shape[0], *x.shape)


def _index_add(
    parts: list[Part], y: Tensor, x: Tensor, dim: int, index: Tensor, source: Tensor, alpha: Any = 1
) -> Part:
    part, values = parts
    if values is None:
        return part
    base = as_vector(accumulator(values, x) if part is None else part)
    return aten.index_add.default(base, axis(dim, x), index, as_vector(values), alpha=alpha).reshape(
        base.shape[0], *y.shape
    )


def _index_copy(parts: list[Part], y: Tensor, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    part, values = parts
    if values is None:
        assert part is not None
        return _index_fill(part, y, x, dim, index)
    base = as_vector(accumulator(values, x) if part is None else part)
    return aten.index_copy.default(base, axis(dim, x), index, as_vector(values)).reshape(base.shape[0], *y.shape)


def _index_fill(part: Tensor, y: Tensor, x: Tensor, dim: int, index: Tensor, *_: Any) -> Tensor:
    return aten.index_fill.int_Scalar(as_vector(part), axis(dim, x), index, 0.0).reshape(part.shape[0], *y.shape)


def _index_fill_tensor(x: Tensor, dim: int, index: Tensor, value: Tensor) -> Tensor:
    nowhere = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    return aten.where.self(aten.index_fill.int_Scalar(nowhere, dim, index, True), value.to(x.dtype), x)


def _scatter_with(x: Tensor, dim: int, index: Tensor, source: Tensor, *, reduce: str) -> Tensor:
    if reduce == "add":
        return aten.scatter_add.default(x, dim, index, source)
    return aten.scatter_reduce.two(x, dim, index, source, "prod")


def _scatter_value_with(x: Tensor, dim: int, index: Tensor, value: Any, *, reduce: str) -> Tensor:
    return _scatter_with(x, dim, index, torch.full(index.shape, value, dtype=x.dtype, device=x.device), reduce=reduce)


register(aten.scatter.src, jointly(_scatter, (0, 3)))
register(aten.scatter.value, mapped(_scatter_value))
register(aten.scatter.reduce, Composite(_scatter_with))
register(aten.scatter.value_reduce, Composite(_scatter_value_with))
register(
    aten.scatter_add.default,
    jointly(lambda parts, y, x, dim, index, source: scattered(parts[0], parts[1], x, dim, index), (0, 3)),
)
register(aten.index_add.default, jointly(_index_add, (0, 3)))
register(aten.index_copy.default, jointly(_index_copy, (0, 3)))
register(aten.index_fill.int_Scalar, mapped(_index_fill))
register(aten.index_fill.int_Tensor, Composite(_index_fill_tensor))


# Writing into a view: the same view of every component.


def _written(form: Callable[..., Tensor]) -> Rule:
    """The rule of an operator that copies a value in its layout and writes into a view of the copy."""

    def checked(parts: list[Part], y: Tensor, x: Tensor, *rest: Any) -> Tensor:
        if _overlaps_itself(x):
            raise UnsupportedOpError(
                "what is written into overlaps itself in memory (an unfold, or another view of that kind), so that a "
                "write changes other elements as well; make it a copy first (.contiguous())"
            )
        return form(parts, y, x, *rest)

    return jointly(checked)


def _overlaps_itself(x: Tensor) -> bool:
    """Whether different indices lead to one place, other than along an expanded axis, which a copy writes out.

    Dynamic sizes count as at the first call. Where the data decide one, the layout is taken for one without overlaps.
    """
    axes = [(known(stride), known(size)) for stride, size in zip(x.stride(), x.shape, strict=True)]
    longer = [(stride, size) for stride, size in axes if stride is not None and size is not None and size > 1]
    if len(longer) < sum(size != 1 for _, size in axes) or any(stride == 0 for stride, _ in longer):
        return False
    reach = 0
    for stride, size in sorted(longer):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _slice_scatter(
    parts: list[Part], y: Tensor, x: Tensor, source: Tensor, dim: int, start: Any, end: Any, step: int
) -> Tensor:
    part, values = parts
    dim, size = axis(dim, x), x.shape[dim]
    if values is None:
        places = aten.slice.Tensor(torch.arange(size, device=x.device), 0, start, end, step)
        return aten.index_fill.int_Scalar(part, dim, places, 0.0)
    is_known = all(isinstance(n, int) for n in (size, values.shape[dim])) and isinstance(start, (int, type(None)))
    if part is None and step == 1 and is_known:
        before = slice(start, None).indices(size)[0]
        return padded(values, dim, before, size - before - values.shape[dim])
    part = accumulator(values, x) if part is None else part
    return aten.slice_scatter.default(part, values, dim, start, end, step)


def _select_scatter(parts: list[Part], y: Tensor, x: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    part, values = parts
    dim, size = axis(dim, x), x.shape[dim]
    if values is None:
        place = torch.arange(size, device=x.device).select(0, index).reshape(1)
        return aten.index_fill.int_Scalar(part, dim, place, 0.0)
    if part is None:
        return padded(values.unsqueeze(dim), dim, index % size, size - 1 - index % size)
    return aten.select_scatter.default(part, values, dim, index)


def _diagonal_scatter(
    parts: list[Part], y: Tensor, x: Tensor, source: Tensor, offset: int, first: int, second: int
) -> Tensor:
    part, values = parts
    if values is None:
        off = torch.ones(source.shape, dtype=torch.bool, device=x.device)
        nowhere = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        mask = aten.diagonal_scatter.default(nowhere, off, offset, first, second)
        return aten.masked_fill.Scalar(part, mask, 0.0)
    part = accumulator(values, x) if part is None else part
    return aten.diagonal_scatter.default(part, values, offset, axis(first, x), axis(second, x))


def _as_strided_scatter(
    parts: list[Part], y: Tensor, x: Tensor, source: Tensor, size: Any, stride: Any, offset: int | None
) -> Tensor:
    part, values = parts
    order, index = storage_index(x, size, stride, offset)
    if part is None:
        assert values is not None
        part = accumulator(values, x)
    flat = in_storage_order(part, order)
    zero = torch.zeros((), dtype=flat.dtype, device=flat.device) if values is None else values
    flat = aten.index_put.default(flat, [None, index], zero)
    inside_out = [order.index(d) + 1 for d in range(x.ndim)]
    return flat.reshape(-1, *[x.shape[d] for d in order]).permute(0, *inside_out)


register(aten.slice_scatter.default, _written(_slice_scatter))
register(aten.select_scatter.default, _written(_select_scatter))
register(aten.diagonal_scatter.default, _written(_diagonal_scatter))
register(aten.as_strided_scatter.default, _written(_as_strided_scatter))
