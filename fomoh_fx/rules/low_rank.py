"""Products with a factor whose tangents are of low rank: from the right order of multiplication.

With w_k = left_k right_k, phi(x, w_k) = outer(inner(x, right_k), left_k), where ``inner`` gives R numbers for each
place of the result and ``outer`` sums over them. Hence

    y_i += outer(inner(x, right_i), left_i)
    y_c += sum_ij S_c,ij (outer(inner(x_i, right_j), left_j) + outer(inner(x_j, right_i), left_i))

and the sum of two is one sum over both ranks (over all directions' for a trace). What else the operator's arguments
have is expanded by its own rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.low_rank import LowRank
from fomoh_fx.rules.registry import FACTORED, Rule, rule_for
from fomoh_fx.rules.stacking import bind, fold, primals

aten = torch.ops.aten


@dataclass(frozen=True)
class Way:
    """How a product goes through the factors of one argument.

    Attributes:
        other: the position of the argument x that it is a product with.
        tangents: those of the factored argument, with the axis that ``right`` sums over in ``x`` last.
        inner: (x ``[A, *x]``, right ``[K, R, ..]``) to phi(x_a, right_k): ``[A, K, R, *places]``.
        axis: where the axis M of ``left`` stands among the places of one result.
    """

    other: int
    tangents: LowRank
    inner: Callable[[Tensor, Tensor], Tensor]
    axis: int

    def outer(self, coefficients: Tensor, left: Tensor) -> Tensor:
        """Sums over the ranks: [C, R, *places], [C, M, R] -> [C, *places] with M among the places."""
        c, r, *places = coefficients.shape
        columns, m, axis = coefficients.reshape(c, r, math.prod(places)), left.shape[1], self.axis % (len(places) + 1)
        if axis == len(places):  # as the rows that it is used as
            return torch.bmm(columns.mT, left.mT).reshape(c, *places, m)
        return torch.bmm(left, columns).reshape(c, m, *places).movedim(1, axis + 1)


def _joined(components: Components, table: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """What each cross component sums over: coefficients [C, R', *places] of a table [K, K, R, *places], and columns."""
    if components.spans_pairs:
        rows, columns, *_ = components.indices(table.device)
        both = torch.cat([table[rows, columns], table[columns, rows]], 1)
        return both, torch.cat([left[columns], left[rows]], 2)
    own = table.diagonal(dim1=0, dim2=1).movedim(-1, 0) * 2
    if components.second_order == "trace":
        return fold(own).unsqueeze(0), left.movedim(0, 1).flatten(1).unsqueeze(0)
    return own, left


def through(way_of: Callable[..., Way | None]) -> Rule:
    """The rule of a product, some argument of which is factored.

    Args:
        way_of: (position of the factored argument, its tangents, the operator's arguments) to the way through it, or
            None where the tangents have to be multiplied out.
    """

    def rule(op: Any, components: Components, *args: Any, **kwargs: Any) -> Any:
        at = [i for i, arg in enumerate(args) if isinstance(arg, HyperDual) and isinstance(arg.tangent, LowRank)]
        way = way_of(at[0], args[at[0]].tangent, primals(args, kwargs)[0]) if len(at) == 1 else None
        if way is None or args[at[0]].cross is not None:
            options = {name: multiplied_out(value) for name, value in kwargs.items()}
            return rule_for(op)(op, components, *map(multiplied_out, args), **options)
        rest = [arg.primal if i == at[0] else arg for i, arg in enumerate(args)]
        y = rule_for(op)(op, components, *rest, **kwargs) if any(isinstance(a, HyperDual) for a in rest) else None
        y = y if isinstance(y, HyperDual) else HyperDual(op(*primals(args, kwargs)[0], **kwargs))
        return _with_factors(components, y, args[way.other], way)

    return rule


def _with_factors(components: Components, y: HyperDual, x: Any, way: Way) -> HyperDual:
    """What the factored tangents add to a result."""
    x = x if isinstance(x, HyperDual) else HyperDual(x)
    left, right = way.tangents.left, way.tangents.right
    tangent = add(y.tangent, way.outer(way.inner(x.primal.unsqueeze(0), right)[0], left))
    if components.second_order is None or x.tangent is None:
        return HyperDual(y.primal, tangent, y.cross)
    pairs = way.outer(*_joined(components, way.inner(x.tangent, right), left))
    return HyperDual(y.primal, tangent, add(y.cross, pairs))


def multiplied_out(x: Any) -> Any:
    """A HyperDual with one stack of tangents, whatever it has; anything else as it is."""
    if isinstance(x, HyperDual) and isinstance(x.tangent, LowRank):
        return HyperDual(x.primal, x.tangent.dense(), x.cross)
    return x


def _transposed(tangents: LowRank) -> LowRank:
    return LowRank(tangents.right.mT, tangents.left.mT)


def _columns_of(x: Tensor, right: Tensor) -> Tensor:
    """x [A, *S, D] times right [K, R, D] -> [A, K, R, *S]."""
    k, r, d = right.shape
    product = aten.linear.default(x, right.reshape(k * r, d))
    return product.reshape(*x.shape[:-1], k, r).movedim((-2, -1), (1, 2))


def _rows_of(x: Tensor, right: Tensor) -> Tensor:
    """right [K, R, D] times x [A, D, M] -> [A, K, R, M]."""
    k, r, d = right.shape
    return torch.matmul(right.reshape(k * r, d), x).reshape(x.shape[0], k, r, x.shape[2])


def _linear(at: int, tangents: LowRank, args: Any) -> Way | None:
    """y = x w^T + b."""
    return Way(0, tangents, _columns_of, -1) if at == 1 and args[1].ndim == 2 else None


def _mm(at: int, tangents: LowRank, args: Any) -> Way:
    """y = x w, or y = w x."""
    return Way(0, _transposed(tangents), _columns_of, -1) if at == 1 else Way(1, tangents, _rows_of, 0)


def _convolution(at: int, tangents: LowRank, args: Any) -> Way | None:
    """One group: the directions' kernels ``right`` give R channels each, which ``left`` mixes."""
    x, w, _, stride, padding, dilation, transposed, output_padding, groups, *_ = args
    if at != 1 or transposed or groups != 1 or x.ndim != w.ndim:
        return None

    def inner(x: Tensor, right: Tensor) -> Tensor:
        y = aten.convolution.default(fold(x), fold(right), None, stride, padding, dilation, False, output_padding, 1)
        y = y.reshape(*x.shape[:2], *right.shape[:2], *y.shape[2:])
        return y.movedim(1, 3)

    return Way(0, tangents, inner, 1)


def _embedding(op: Any, components: Components, w: HyperDual, indices: Tensor, *options: Any) -> HyperDual:
    """Rows of ``left``, each times ``right``."""
    tangents = w.tangent
    rows = rule_for(op)(op, components, HyperDual(w.primal, tangents.left), indices, *options)
    k, r, d = tangents.right.shape
    product = torch.bmm(rows.tangent.reshape(k, indices.numel(), r), tangents.right)
    return HyperDual(rows.primal, product.reshape(k, *indices.shape, d))


def _swapped(op: Any, components: Components, w: HyperDual, *dims: Any) -> Any:
    """A matrix with its axes in another order."""
    if w.primal.ndim != 2:
        return rule_for(op)(op, components, multiplied_out(w), *dims)
    order = op(torch.empty(1, 2, device="meta"), *dims).shape
    return HyperDual(op(w.primal, *dims), _transposed(w.tangent) if order[0] == 2 else w.tangent)


def _rows(at: int) -> Rule:
    """Some rows, or several parts of them, by an operator whose argument number ``at`` is the axis."""

    def rule(op: Any, components: Components, w: HyperDual, *options: Any) -> Any:
        if bind(op, (w, *options), {})[at] % w.primal.ndim != 0:
            return rule_for(op)(op, components, multiplied_out(w), *options)
        parts = rule_for(op)(op, components, HyperDual(w.primal, w.tangent.left), *options)
        return pytree.tree_map_only(
            HyperDual,
            lambda part: HyperDual(part.primal, LowRank(part.tangent, w.tangent.right)),
            parts,
            is_leaf=lambda x: isinstance(x, HyperDual),
        )

    return rule


FACTORED.update({
    aten.linear.default: through(_linear),
    aten.mm.default: through(_mm),
    aten.convolution.default: through(_convolution),
    aten.embedding.default: _embedding,
    **dict.fromkeys([aten.t.default, aten.transpose.int, aten.permute.default], _swapped),
    aten.slice.Tensor: _rows(1),
    **dict.fromkeys(
        [
            aten.split.Tensor, aten.split_with_sizes.default, aten.unsafe_split.Tensor,
            aten.unsafe_split_with_sizes.default,
        ],
        _rows(2),
    ),
})  # fmt: skip
