"""The product rule, in as few products as pay.

y_i = phi(x_i, w) + phi(x, w_i) and y_c = phi(x_c, w) + phi(x, w_c) + sum_ij S_c,ij (phi(x_i, w_j) + phi(x_j, w_i)).

With the primal as number 0, the first-order terms and the pairs are one family, phi(x_i, w_j) + phi(x_j, w_i) for
0 <= i <= j <= K: 2 K + K^2 products plainly. Each of them is also one product of sums (Karatsuba and Ofman 1962)::

    phi(x_i, w_j) + phi(x_j, w_i) = phi(x_i + x_j, w_i + w_j) - phi(x_i, w_i) - phi(x_j, w_j)

where phi(x_i, w_i) is the product of sums for i = j, divided by 4: K + K (K + 1) / 2 products, and phi(x, w) is the
primal. A plane of one direction takes 4 products of the primal's size and not 5, one of three 16 and not 22.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor

from fomoh_fx.hyperdual import Components, HyperDual, add

Phi = Callable[[Tensor, Tensor], Tensor]

#: Multiplications of a product for each number that it reads or writes, from which on fewer products are faster though
#: they add up their factors first. Measured on a CPU, where 16 to 64 break even (benchmarks/README.md).
WORTH_ADDING = 64
#: The most numbers that the sums of one product's factors may have, 1 GiB in float32: they are there all at once.
MOST_SUMS = 2**28


@dataclass(frozen=True)
class Forms:
    """How a product is taken with stacks of components: of the left factor, of the right, and of all pairs.

    ``pairs`` maps ([K, ..], [K, ..]) to sum_ij S_c,ij (phi(x_i, w_j) + phi(x_j, w_i)), and ``alike`` maps two stacks of
    one length to phi(x_k, w_k). ``intensity`` is how many multiplications the product does for each number that it
    reads or writes; without it the plain form is taken.
    """

    left: Phi
    right: Phi
    pairs: Callable[[Components, Tensor, Tensor], Tensor]
    alike: Phi | None = None
    intensity: float = 0.0


def intensity(n: int | SymInt, d: int | SymInt, m: int | SymInt) -> float:
    """Of a product [N, D] @ [D, M]; a dynamic size counts as at the first call, one that depends on data as none."""
    n, d, m = map(_known, (n, d, m))
    return n * d * m / max(n * d + d * m + n * m, 1)


def _known(size: int | SymInt) -> int:
    return (size.node.hint or 0) if isinstance(size, SymInt) else size


def fewer_products_pay(forms: Forms, components: Components, x: Any, w: Any) -> bool:
    """Whether there are fewer products of sums, each large enough to be faster, and the sums not too many to hold.

    Where factors are rounded to half precision or TF32 never: rounding would grow with what then cancels. Complex
    numbers are left alone, too.
    """
    if components.second_order is None or forms.alike is None or forms.intensity < WORTH_ADDING:
        return False
    if not all(isinstance(factor, HyperDual) and factor.tangent is not None for factor in (x, w)):
        return False
    count = components.directions + len(components.pairs)
    if count * (_known(x.primal.numel()) + _known(w.primal.numel())) > MOST_SUMS:
        return False
    exact = x.primal.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return exact or x.primal.dtype == torch.float64


def expand(forms: Forms, components: Components, y: Tensor, x: Any, w: Any) -> HyperDual:
    """The components of y = phi(x, w), from whichever components of x and w exist."""
    x, w = (factor if isinstance(factor, HyperDual) else HyperDual(factor) for factor in (x, w))

    def linear(x_part: Tensor | None, w_part: Tensor | None) -> Tensor | None:
        return add(
            None if x_part is None else forms.left(x_part, w.primal),
            None if w_part is None else forms.right(x.primal, w_part),
        )

    cross = None if components.second_order is None else linear(x.cross, w.cross)
    if forms.alike is not None and fewer_products_pay(forms, components, x, w):
        by_sums, pairs = _by_sums(forms.alike, components, y, x, w)
        return HyperDual(y, by_sums, add(cross, pairs))
    tangent = linear(x.tangent, w.tangent)
    if components.second_order is not None and x.tangent is not None and w.tangent is not None:
        cross = add(cross, forms.pairs(components, x.tangent, w.tangent))
    return HyperDual(y, tangent, cross)


def _by_sums(alike: Phi, components: Components, y: Tensor, x: HyperDual, w: HyperDual) -> tuple[Tensor, Tensor]:
    """All first-order terms [K, ..] and all pairs [C, ..] by products of sums, one call for both."""
    k, scale = components.directions, _scales(x, w)

    def scaled(stack: Tensor) -> Tensor:
        return stack * _column(scale, stack)

    def sums(factor: HyperDual) -> Tensor:
        tangent = scaled(factor.tangent)
        first, second = components.ends(tangent)
        return torch.cat([factor.primal + tangent, first + second])

    products = alike(sums(x), sums(w))
    with_primal, pairs = products[:k], products[k:]
    squares = components.diagonal(pairs) / 4
    square_i, square_j = components.ends(squares)
    scale_i, scale_j = components.ends(scale)
    tangent = (with_primal - y - squares) / _column(scale, y.unsqueeze(0))
    pairs = (pairs - square_i - square_j) / _column(scale_i * scale_j, pairs)
    return tangent, components.reduce(pairs)


def _column(vector: Tensor, stack: Tensor) -> Tensor:
    return vector.reshape(-1, *[1] * (stack.ndim - 1))


def _scales(x: HyperDual, w: HyperDual) -> Tensor:
    """[K]: powers of two, by which both tangents of a direction are multiplied before they are added to others.

    The magnitude of x_i w_i becomes that of x w. By the inequality of the arithmetic and the geometric mean the numbers
    that then cancel are in norm no larger than the result's own two terms, so that rounding grows by a small factor.
    """
    sizes = torch.stack([_magnitude(f.tangent, 1) / _magnitude(f.primal, 0) for f in (x, w)])
    known = sizes.isfinite() & (sizes > 0)  # a factor that is zero says nothing, the other one may
    exponent = torch.where(known, sizes, 1).log2().sum(0) / known.sum(0).clamp(min=1)
    return exponent.round().neg().exp2()


def _magnitude(x: Tensor, start: int) -> Tensor:
    """The mean of the absolute values over the axes from ``start`` on; what is not finite counts as zero."""
    size = x.abs().flatten(start)
    return torch.where(size < torch.inf, size, 0).mean(start)
