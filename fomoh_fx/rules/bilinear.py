"""Bilinear operators, products above all.

y_i = phi(x_i, w) + phi(x, w_i) and y_c = phi(x_c, w) + phi(x, w_c) + sum_ij S_c,ij (phi(x_i, w_j) + phi(x_j, w_i)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.rules.registry import Rule, register
from fomoh_fx.rules.stacking import batched, fold, primals

aten = torch.ops.aten
Phi = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Forms:
    """How a product is taken with stacks of components: of the left factor, of the right, and of all pairs.

    ``pairs`` maps ([K, ..], [K, ..]) to sum_ij S_c,ij (phi(x_i, w_j) + phi(x_j, w_i)).
    """

    left: Phi
    right: Phi
    pairs: Callable[[Components, Tensor, Tensor], Tensor]


def expand(forms: Forms, components: Components, y: Tensor, x: Any, w: Any) -> HyperDual:
    """The product rule, on whichever components exist."""
    x, w = (a if isinstance(a, HyperDual) else HyperDual(a) for a in (x, w))

    def first(x_part: Tensor | None, w_part: Tensor | None) -> Tensor | None:
        return add(
            None if x_part is None else forms.left(x_part, w.primal),
            None if w_part is None else forms.right(x.primal, w_part),
        )

    tangent, cross = first(x.tangent, w.tangent), None
    if components.second_order is not None:
        cross = first(x.cross, w.cross)
        if x.tangent is not None and w.tangent is not None:
            cross = add(cross, forms.pairs(components, x.tangent, w.tangent))
    return HyperDual(y, tangent, cross)


def bilinear(i: int = 0, j: int = 1) -> Rule:
    """The rule of an operator that is linear in its arguments number i and j, for any such operator.

    All pairs are one call of the operator over two batch axes where the plane needs every product, and one call over
    the shared axis otherwise.
    """

    def rule(op: Callable[..., Tensor], components: Components, *args: Any, **kwargs: Any) -> HyperDual:
        plain, options = primals(args, kwargs)
        y = op(*plain, **options)

        def both(x: Tensor, w: Tensor) -> Tensor:
            return batched(op, plain, options, {i: x, j: w})

        def table(x: Tensor, w: Tensor) -> Tensor:
            return torch.vmap(lambda x_i: torch.vmap(lambda w_j: op(*_with(plain, {i: x_i, j: w_j}), **options))(w))(x)

        def pairs(components: Components, x: Tensor, w: Tensor) -> Tensor:
            return components.gather(table(x, w)) if components.spans_pairs else components.product(both, x, w)

        forms = Forms(
            left=lambda x, _: batched(op, plain, options, {i: x}),
            right=lambda _, w: batched(op, plain, options, {j: w}),
            pairs=pairs,
        )
        return expand(forms, components, y, args[i], args[j])

    rule.kind = "bilinear"  # type: ignore[attr-defined]
    return rule


def _with(args: tuple[Any, ...], at: dict[int, Any]) -> list[Any]:
    return [at.get(n, arg) for n, arg in enumerate(args)]


# Matrix products. x is [.., N, D] with components [K, .., N, D]; w is [D, M] with components [K, D, M].


def _mm_pairs(components: Components, x: Tensor, w: Tensor) -> Tensor:
    """All K x K products [N, D] @ [D, M] as one product [K*N, D] @ [D, K*M], or a trace's sum as one [N, K*D] @ [K*D, M]."""
    k = components.directions
    if components.second_order == "trace":
        long = aten.mm(x.movedim(0, 1).reshape(x.shape[1], -1), fold(w))
        return long.unsqueeze(0) * 2
    if not components.spans_pairs:
        return aten.bmm(x, w) * 2
    wide = aten.mm(fold(x), w.movedim(0, 1).reshape(w.shape[1], -1))
    return components.gather(wide.reshape(k, x.shape[1], k, w.shape[2]), 0, 2)


def _mm(op: Any, components: Components, x: Any, w: Any) -> HyperDual:
    forms = Forms(
        left=lambda x, w: aten.mm(fold(x), w).reshape(x.shape[0], x.shape[1], w.shape[1]),
        right=lambda x, w: aten.matmul(x, w),
        pairs=_mm_pairs,
    )
    return expand(forms, components, op(*primals((x, w), {})[0]), x, w)


def _bmm(op: Any, components: Components, x: Any, w: Any) -> HyperDual:
    def pairs(components: Components, x: Tensor, w: Tensor) -> Tensor:
        """[K, B, N, D] and [K, B, D, M]: the rows of all x_i against the columns of all w_j, in each of B products."""
        k, b, n, d = x.shape
        m = w.shape[-1]
        if components.second_order == "trace":
            return aten.bmm(x.permute(1, 2, 0, 3).reshape(b, n, k * d), w.movedim(0, 1).reshape(b, k * d, m))[None] * 2
        if not components.spans_pairs:
            return aten.matmul(x, w) * 2
        table = aten.bmm(x.movedim(0, 1).reshape(b, k * n, d), w.permute(1, 2, 0, 3).reshape(b, d, k * m))
        return components.gather(table.reshape(b, k, n, k, m), 1, 3)

    forms = Forms(left=aten.matmul, right=aten.matmul, pairs=pairs)
    return expand(forms, components, op(*primals((x, w), {})[0]), x, w)


def _linear(op: Any, components: Components, x: Any, w: Any, b: Any = None) -> HyperDual:
    """y = x w^T + b with x [.., D], w [M, D], b [M]."""
    plain = primals((x, w, b), {})[0]
    y = op(*plain)
    rows = plain[0].shape[:-1]

    def right(x: Tensor, w: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return aten.matmul(flat, w.transpose(1, 2)).reshape(w.shape[0], *rows, w.shape[1])

    def pairs(components: Components, x: Tensor, w: Tensor) -> Tensor:
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        product = _mm_pairs(components, flat, w.transpose(1, 2))
        return product.reshape(product.shape[0], *rows, w.shape[1])

    result = expand(Forms(left=aten.linear.default, right=right, pairs=pairs), components, y, x, w)
    if isinstance(b, HyperDual):
        lift = [None if p is None else p.reshape(p.shape[0], *[1] * (y.ndim - 1), -1) for p in (b.tangent, b.cross)]
        result = HyperDual(y, add(result.tangent, lift[0]), add(result.cross, lift[1]))
    return result


for ops, rule in {aten.mm.default: _mm, aten.bmm.default: _bmm, aten.linear.default: _linear}.items():
    register(ops, rule, "bilinear")


def _convolution(op: Any, components: Components, x: Any, w: Any, b: Any, *options: Any) -> HyperDual:
    """Bilinear in input and weight; the bias [O] is added once for each of its components."""
    y = op(*primals((x, w, b, *options), {})[0])
    result = bilinear(0, 1)(op, components, x, w, None, *options) if _active(x, w) else HyperDual(y)
    parts = [result.tangent, result.cross]
    if isinstance(b, HyperDual):
        shape = [1] * (y.ndim - 2)
        lift = [None if p is None else p.reshape(p.shape[0], 1, -1, *shape) for p in (b.tangent, b.cross)]
        parts = [add(part, lifted) for part, lifted in zip(parts, lift, strict=True)]
    return HyperDual(y, *parts)


def _active(*args: Any) -> bool:
    return any(isinstance(a, HyperDual) for a in args)


register(aten.convolution.default, _convolution, "bilinear")
