"""Bilinear operators, products above all: what each gives the product rule (products.py) to work with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.rules.linear import refused
from fomoh_fx.rules.products import Forms, Phi, expand, fewer_products_pay, intensity
from fomoh_fx.rules.registry import Composite, Rule, register
from fomoh_fx.rules.stacking import align, batched, fold, primals
from fomoh_fx.sizes import known

aten = torch.ops.aten

#: The fewest columns of a product that is taken in parts.
NARROWEST = 128
#: The most numbers that the copies of a left factor for all parts may have.
MOST_COPIED = 2**24


def bilinear(i: int = 0, j: int = 1) -> Rule:
    """The rule of an operator that is linear in its arguments number i and j, for any such operator.

    All pairs are one call of the operator over two batch axes where the plane needs every product, and one call over
    the shared axis otherwise.
    """

    def rule(op: Callable[..., Tensor], components: Components, *args: Any, **kwargs: Any) -> HyperDual:
        plain, options = primals(args, kwargs)
        return expand(forms_of(op, plain, options, i, j), components, op(*plain, **options), args[i], args[j])

    rule.kind = "bilinear"  # type: ignore[attr-defined]
    return rule


def forms_of(op: Callable[..., Tensor], args: tuple[Any, ...], options: dict[str, Any], i: int, j: int) -> Forms:
    """The forms of any operator that is linear in its arguments number i and j, by vmap."""

    def both(x: Tensor, w: Tensor) -> Tensor:
        return batched(op, args, options, {i: x, j: w})

    def table(x: Tensor, w: Tensor) -> Tensor:
        return torch.vmap(lambda x_i: torch.vmap(lambda w_j: op(*_with(args, {i: x_i, j: w_j}), **options))(w))(x)

    def pairs(components: Components, x: Tensor, w: Tensor) -> Tensor:
        return components.gather(table(x, w)) if components.spans_pairs else components.product(both, x, w)

    return Forms(
        left=lambda x, _: batched(op, args, options, {i: x}),
        right=lambda _, w: batched(op, args, options, {j: w}),
        pairs=pairs,
    )


def _with(args: tuple[Any, ...], at: dict[int, Any]) -> list[Any]:
    return [at.get(n, arg) for n, arg in enumerate(args)]


# Matrix products. x is [.., N, D] with components [K, .., N, D]; w is [D, M] with components [K, D, M].


def _mm_pairs(components: Components, x: Tensor, w: Tensor) -> Tensor:
    """All K x K products [N, D] @ [D, M] as one [K*N, D] @ [D, K*M], or a trace's sum as one [N, K*D] @ [K*D, M]."""
    k = components.directions
    if components.second_order == "trace":
        long = aten.mm(x.movedim(0, 1).reshape(x.shape[1], k * x.shape[2]), fold(w))
        return long.unsqueeze(0) * 2
    if not components.spans_pairs:
        return aten.bmm(x, w) * 2
    wide = aten.mm(fold(x), w.movedim(0, 1).reshape(w.shape[1], k * w.shape[2]))
    return components.gather(wide.reshape(k, x.shape[1], k, w.shape[2]), 0, 2)


def _mm(op: Any, components: Components, x: Any, w: Any) -> HyperDual:
    plain = primals((x, w), {})[0]
    forms = Forms(
        left=lambda x, w: aten.mm(fold(x), w).reshape(x.shape[0], x.shape[1], w.shape[1]),
        right=lambda x, w: aten.matmul(x, w),
        pairs=_mm_pairs,
        alike=aten.bmm,
        intensity=intensity(plain[0].shape[0], *plain[1].shape),
        numbers=plain[0].shape[0] * plain[1].shape[1],
    )
    return expand(forms, components, op(*plain), x, w)


def _bmm(op: Any, components: Components, x: Any, w: Any) -> HyperDual:
    """B products [N, D] @ [D, M]: components of x are more rows of each, components of w more columns."""
    plain = primals((x, w), {})[0]
    b, n, d = plain[0].shape
    m = plain[1].shape[2]

    def rows(x: Tensor) -> Tensor:
        return x.movedim(0, 1).reshape(b, x.shape[0] * n, d)

    def columns(w: Tensor) -> Tensor:
        return w.permute(1, 2, 0, 3).reshape(b, d, w.shape[0] * m)

    def left(x: Tensor, w: Tensor) -> Tensor:
        return aten.bmm(rows(x), w).reshape(b, x.shape[0], n, m).movedim(1, 0)

    def right(x: Tensor, w: Tensor) -> Tensor:
        return aten.bmm(x, columns(w)).reshape(b, n, w.shape[0], m).movedim(2, 0)

    def pairs(components: Components, x: Tensor, w: Tensor) -> Tensor:
        k = components.directions
        if components.second_order == "trace":
            return aten.bmm(x.permute(1, 2, 0, 3).reshape(b, n, k * d), w.movedim(0, 1).reshape(b, k * d, m))[None] * 2
        if not components.spans_pairs:
            return aten.matmul(x, w) * 2
        return components.gather(aten.bmm(rows(x), columns(w)).reshape(b, k, n, k, m), 1, 3)

    return expand(Forms(left, right, pairs), components, op(*plain), x, w)


def _each_with_its_own(x: Tensor, w: Tensor) -> Tensor:
    """K products x [K, N, D] times w^T, w [K, M, D]: -> [K, N, M].

    On a CPU as more and narrower products, where that many can be shared out evenly among the threads: whole products
    are, and three on two threads leave one of them idle for a quarter of the time.
    """
    (k, m, d), n = w.shape, x.shape[1]
    threads = torch.get_num_threads() if x.device.type == "cpu" else 1
    parts = threads // math.gcd(k, threads)
    if parts == 1 or m % parts or m // parts < NARROWEST or (known(x.numel()) or 0) * parts > MOST_COPIED:
        return aten.bmm(x, w.transpose(1, 2))
    x = x.unsqueeze(1).expand(k, parts, n, d).reshape(k * parts, n, d)
    y = aten.bmm(x, w.reshape(k * parts, m // parts, d).transpose(1, 2))
    return y.reshape(k, parts, n, m // parts).transpose(1, 2).reshape(k, n, m)


def _linear(op: Any, components: Components, x: Any, w: Any, b: Any = None) -> HyperDual:
    """y = x w^T + b with x [.., D], w [M, D], b [M] or whatever else broadcasts to y; or w [D] without M in y."""
    plain = primals((x, w, b), {})[0]
    shape = [*plain[0].shape[:-1], *plain[1].shape[:-1]]
    n, d, m = math.prod(plain[0].shape[:-1]), plain[0].shape[-1], math.prod(plain[1].shape[:-1])

    def rows(x: Tensor) -> Tensor:
        """Of a stack of components: [K, .., D] -> [K, N, D]."""
        return x.reshape(x.shape[0], n, d)

    def outputs(w: Tensor) -> Tensor:
        """Of a stack of components: [K, M, D], also without M."""
        return w if w.ndim == 3 else w.unsqueeze(1)

    def alike(x: Tensor, w: Tensor) -> Tensor:
        return _each_with_its_own(rows(x), outputs(w)).reshape(w.shape[0], *shape)

    def right(x: Tensor, w: Tensor) -> Tensor:
        if w.shape[0] == 1:
            return aten.linear.default(x, w.squeeze(0)).unsqueeze(0)
        return alike(x.expand(w.shape[0], *x.shape), w)

    def pairs(components: Components, x: Tensor, w: Tensor) -> Tensor:
        if w.shape[0] == 1:
            return aten.linear.default(x, w.squeeze(0)) * 2
        product = _mm_pairs(components, rows(x), outputs(w).transpose(1, 2))
        return product.reshape(product.shape[0], *shape)

    forms = Forms(aten.linear.default, right, pairs, alike, intensity(n, d, m), n * m)
    if plain[2] is None or not fewer_products_pay(forms, components, x, w):
        y = op(*plain)
        result = expand(forms, components, y, x, w)
    else:  # these need the product by itself
        product = expand(forms, components, op(*plain[:2]), x, w)
        y = product.primal + plain[2]
        result = HyperDual(y, product.tangent, product.cross)
    if isinstance(b, HyperDual):
        lift = [None if p is None else align(p, b.primal, y.ndim) for p in (b.tangent, b.cross)]
        result = HyperDual(y, add(result.tangent, lift[0]), add(result.cross, lift[1]))
    return result


for ops, rule in {aten.mm.default: _mm, aten.bmm.default: _bmm, aten.linear.default: _linear}.items():
    register(ops, rule, "bilinear")


def _convolution(op: Any, components: Components, x: Any, w: Any, b: Any, *options: Any) -> HyperDual:
    """Bilinear in input and weight; the bias [O] is added once for each of its components.

    Components of the input are more samples, components of the weight more output channels of each group, and pairs
    of one direction more groups. By hand, because vmap's own rule fixes a dynamic batch.
    """
    plain = primals((x, w, b, *options), {})[0]
    stride, padding, dilation, transposed, output_padding, groups, *flags = plain[3:]
    grouped = [groups] if groups > 1 else []  # an axis of one group would only be moved about

    def convolve(x: Tensor, w: Tensor, groups: int) -> Tensor:
        return op(x, w, None, stride, padding, dilation, transposed, output_padding, groups, *flags)

    def channels(w: Tensor) -> Tensor:
        """[K, O, I/G, ..] -> [G K O/G, I/G, ..]; transposed, [K, I, O/G, ..] -> [I, K O/G, ..]."""
        if transposed:
            return w.movedim(0, 1).reshape(w.shape[1], w.shape[0] * w.shape[2], *w.shape[3:])
        return fold(w if groups == 1 else w.unflatten(1, (groups, -1)).movedim(1, 0).flatten(1, 2))

    def left(x: Tensor, w: Tensor) -> Tensor:
        y = convolve(fold(x), w, groups)
        return y.reshape(*x.shape[:2], *y.shape[1:])

    def table(x: Tensor, w: Tensor) -> Tensor:
        """Each sample times each component of the weight: [N, ..], [K, ..] -> [N, G, K, O/G, ..] (no G of 1)."""
        y = convolve(x, channels(w), groups)
        each = y.shape[1] // w.shape[0] // groups
        return y.reshape(y.shape[0], *grouped, w.shape[0], each, *y.shape[2:])

    def joined(y: Tensor) -> Tensor:
        return y if groups == 1 else y.flatten(2, 3)

    def right(x: Tensor, w: Tensor) -> Tensor:
        return joined(table(x, w).movedim(1 + len(grouped), 0))

    def both(x: Tensor, w: Tensor) -> Tensor:
        y = convolve(x.movedim(0, 1).flatten(1, 2), w.flatten(0, 1), groups * x.shape[0])
        return y.unflatten(1, (x.shape[0], -1)).movedim(1, 0)

    def pairs(components: Components, x: Tensor, w: Tensor) -> Tensor:
        if not components.spans_pairs:
            return components.product(both, x, w)
        y = table(fold(x), w)
        return joined(components.gather(y.reshape(*x.shape[:2], *y.shape[1:]), 0, 2 + len(grouped)))

    y = op(*plain)
    result = expand(Forms(left, right, pairs), components, y, x, w)
    if not isinstance(b, HyperDual):
        return result
    lift = [None if p is None else p.reshape(p.shape[0], 1, -1, *[1] * (y.ndim - 2)) for p in (b.tangent, b.cross)]
    return HyperDual(y, add(result.tangent, lift[0]), add(result.cross, lift[1]))


def grouped_mm(
    op: Any, components: Components, x: Any, w: Any, offs: Any = None, *rest: Any, **kwargs: Any
) -> HyperDual:
    """Rows [M, D] in groups that end at ``offs``, each times its own [D, N] of w [G, D, N].

    Components of x are more rows of the same group, components of w more columns.
    """
    plain, options = primals((x, w, offs, *rest), kwargs)
    x_primal, w_primal = plain[:2]
    if x_primal.ndim != 2 or w_primal.ndim != 3 or any(r is not None for r in (*rest, *kwargs.values())):
        raise UnsupportedOpError(
            "grouped products are differentiated for rows [M, D] with weights [G, D, N] and without bias or out_dtype, "
            f"not for {list(x_primal.shape)} and {list(w_primal.shape)}; write other forms with torch.bmm"
        )
    m, n = x_primal.shape[0], w_primal.shape[2]

    def left(x: Tensor, w: Tensor) -> Tensor:
        rows = fold(x.movedim(0, 1))
        return op(rows, w, offs * x.shape[0]).reshape(m, x.shape[0], w.shape[2]).movedim(1, 0)

    def right(x: Tensor, w: Tensor) -> Tensor:
        columns = w.permute(1, 2, 0, 3).flatten(2)
        return op(x, columns, offs).reshape(x.shape[0], w.shape[0], n).movedim(1, 0)

    def pairs(components: Components, x: Tensor, w: Tensor) -> Tensor:
        k = components.directions
        columns = w.permute(1, 2, 0, 3).flatten(2)
        table = left(x, columns).reshape(k, m, k, n)
        return components.gather(table, 0, 2)

    return expand(Forms(left, right, pairs), components, op(*plain, **options), x, w)


# Composites of the products above. A factor of one is not multiplied by, and beta = 0 drops its term, as PyTorch does.


def _sum(term: Tensor, beta: Any, product: Tensor, alpha: Any) -> Tensor:
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else (term if beta == 1 else term * beta) + product


def _added(multiply: Phi) -> Composite:
    """beta * input + alpha * multiply(x, w)."""

    def body(term: Tensor, x: Tensor, w: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        y = _sum(term, beta, multiply(x, w), alpha)
        return y.expand(torch.broadcast_shapes(y.shape, term.shape))

    return Composite(body)


def _mv(x: Tensor, w: Tensor) -> Tensor:
    return aten.mm(x, w.unsqueeze(1)).squeeze(1)


def _dot(x: Tensor, w: Tensor) -> Tensor:
    return aten.mm(x.unsqueeze(0), w.unsqueeze(1)).reshape(())


def _outer(x: Tensor, w: Tensor) -> Tensor:
    return x.unsqueeze(1) * w.unsqueeze(0)


def _kron(x: Tensor, w: Tensor) -> Tensor:
    """Every element of x times the whole of w, the axes interleaved."""
    rank = max(x.ndim, w.ndim)
    x, w = (t.reshape(*[1] * (rank - t.ndim), *t.shape) for t in (x, w))
    product = x.reshape(*(n for size in x.shape for n in (size, 1))) * w.reshape(
        *(n for size in w.shape for n in (1, size))
    )
    return product.reshape([a * b for a, b in zip(x.shape, w.shape, strict=True)])


def _bilinear_form(x: Tensor, u: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """y_o = x^T w_o u + b_o with w [O, I, J]: first x w as one product, then a product for each sample."""
    rows, n = x.shape[:-1], math.prod(x.shape[:-1])
    outer, inner, last = w.shape
    left = aten.mm(x.reshape(n, inner), w.movedim(0, 1).flatten(1)).reshape(n, outer, last)
    y = aten.bmm(left, u.reshape(n, last, 1)).reshape(*rows, outer)
    return y if b is None else y + b


def _trilinear(
    x: Tensor, w: Tensor, u: Tensor, expand1: Any, expand2: Any, expand3: Any, sumdim: Any, unroll_dim: int = 1
) -> Tensor:
    """The product of three tensors with new axes of size one, summed over ``sumdim``."""
    for axes, at in ((expand1, 0), (expand2, 1), (expand3, 2)):
        for axis in axes:
            x, w, u = (t.unsqueeze(axis) if n == at else t for n, t in enumerate((x, w, u)))
    return (x * w * u).sum(sumdim)


def _addcmul(term: Tensor, x: Tensor, w: Tensor, *, value: Any = 1) -> Tensor:
    return _sum(term, 1, x * w, value)


def _addcdiv(term: Tensor, x: Tensor, w: Tensor, *, value: Any = 1) -> Tensor:
    return _sum(term, 1, x / w, value)


register([aten.convolution.default, aten._convolution.default], _convolution, "bilinear")
register(aten._grouped_mm.default, grouped_mm, "bilinear")
register(aten.linalg_cross.default, bilinear(0, 1))

PRODUCTS: dict[Any, Composite] = {
    aten.addmm.default: _added(aten.mm.default),
    aten.baddbmm.default: _added(aten.bmm.default),
    aten.addbmm.default: _added(lambda x, w: aten.bmm(x, w).sum(0)),
    aten.addmv.default: _added(_mv),
    aten.addr.default: _added(_outer),
    aten.mv.default: Composite(_mv),
    aten.dot.default: Composite(_dot),
    aten.vdot.default: Composite(lambda x, w: _dot(x.conj(), w)),
    aten.outer.default: Composite(_outer),
    aten.ger.default: Composite(_outer),
    aten.kron.default: Composite(_kron),
    aten.bilinear.default: Composite(_bilinear_form),
    aten._trilinear.default: Composite(_trilinear),
    aten.addcmul.default: Composite(_addcmul),
    aten.addcdiv.default: Composite(_addcdiv),
}
for ops, composite in PRODUCTS.items():
    register(ops, composite)

_SCALED = "products of scaled low-precision values have no derivative in PyTorch; dequantise and use torch.mm"
register([aten._scaled_mm.default, aten._scaled_grouped_mm.default], refused(_SCALED))
