"""The product rule, in as few products as pay.

y_i = phi(x_i, w) + phi(x, w_i) and y_c = phi(x_c, w) + phi(x, w_c) + sum_ij S_c,ij (phi(x_i, w_j) + phi(x_j, w_i)).

With the primal as number 0, the first-order terms and the pairs are one family, phi(x_i, w_j) + phi(x_j, w_i) for
0 <= i <= j <= K: 2 K + K^2 products plainly. Each of them is also one product of sums (Karatsuba and Ofman 1962)::

    phi(x_i, w_j) + phi(x_j, w_i) = phi(x_i + x_j, w_i + w_j) - phi(x_i, w_i) - phi(x_j, w_j)

where phi(x, w) is the primal: K products phi(x_i, w_i) and K (K + 1) / 2 of sums. With the primal's product and those
of cross components, a plane of one direction takes 4 and not 5, a plane of three 16 and not 22.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor

from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.sizes import known

Phi = Callable[[Tensor, Tensor], Tensor]

#: Multiplications of a product for each number that it reads or writes, from which on fewer products are faster though
#: they add up their factors first (benchmarks/README.md).
WORTH_ADDING = 64
#: The most numbers that the sums of one product's factors and their products may have, 1 GiB in float32.
MOST_SUMS = 2**28


@dataclass(frozen=True)
class Forms:
    """How a product is taken with stacks of components: of the left factor, of the right, and of all pairs.

    ``pairs`` maps ([K, ..], [K, ..]) to sum_ij S_c,ij (phi(x_i, w_j) + phi(x_j, w_i)), and ``alike`` maps two stacks of
    one length to phi(x_k, w_k). ``intensity`` is how many multiplications the product does for each number that it
    reads or writes, and ``numbers`` how many the result has; without these the plain form is taken.
    """

    left: Phi
    right: Phi
    pairs: Callable[[Components, Tensor, Tensor], Tensor]
    alike: Phi | None = None
    intensity: float = 0.0
    numbers: int | SymInt = 0


def intensity(n: int | SymInt, d: int | SymInt, m: int | SymInt) -> float:
    """Of a product [N, D] @ [D, M]; a dynamic size counts as at the first call, one that depends on data as none."""
    n, d, m = (known(size) or 0 for size in (n, d, m))
    return n * d * m / max(n * d + d * m + n * m, 1)


def fewer_products_pay(forms: Forms, components: Components, x: Any, w: Any) -> bool:
    """Whether there are fewer products of sums, each large enough to be faster, and the sums not too many to hold.

    On a CPU only, where that was measured. Never where factors are rounded to half precision or less than float32, as
    set when the call is specialised: rounding would grow with what then cancels.
    """
    if components.second_order is None or forms.alike is None or forms.intensity < WORTH_ADDING:
        return False
    if not all(isinstance(factor, HyperDual) and factor.tangent is not None for factor in (x, w)):
        return False
    numbers = sum(known(size) or 0 for size in (x.primal.numel(), w.primal.numel(), forms.numbers))
    if (components.directions + len(components.pairs)) * numbers > MOST_SUMS or x.primal.device.type != "cpu":
        return False
    return x.primal.dtype == torch.float64 or (x.primal.dtype == torch.float32 and products_are_exact())


def products_are_exact() -> bool:
    """Whether the factors of float32 products keep all their bits, as is usual."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set differently for different backends
        return False


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
    """All first-order terms [K, ..] and all pairs [C, ..]: one call for phi(x_i, w_i), and one for the sums."""
    k, scales = components.directions, _scales(x, w)
    own, others = scales[:1], scales[1:]

    def sums(factor: HyperDual) -> Tensor:
        primal, tangent = _times(factor.primal[None], own), _times(factor.tangent, others)
        with_primal = primal + tangent
        if not components.spans_pairs:
            return with_primal
        first, second = components.apart(tangent)
        return torch.cat([with_primal, first + second])

    squares, products = alike(x.tangent, w.tangent), alike(sums(x), sums(w))
    scaled, back = _times(squares, others, others), 1 / others
    tangent = _times(products[:k] - _times(y[None], own, own) - scaled, back, 1 / own)
    if not components.spans_pairs:
        return tangent, components.reduce(squares * 2)
    square_i, square_j = components.apart(scaled)
    apart = _times(products[k:] - square_i - square_j, *components.apart(back))
    return tangent, components.joined(squares * 2, apart)


def _times(stack: Tensor, *scales: Tensor) -> Tensor:
    """Each component times its own powers of two, one after the other: their product may be out of range."""
    for scale in scales:
        stack = stack * scale.reshape(-1, *[1] * (stack.ndim - 1))
    return stack


def _scales(x: HyperDual, w: HyperDual) -> Tensor:
    """[1 + K]: the powers of two by which both primals, and both tangents of each direction, are multiplied.

    ||x_i|| ||w_i|| becomes the same for all i, that of the largest x_i times the largest w_j, which a component of y
    has as well. By the inequality of the arithmetic and the geometric mean the norms of what then cancels add up to no
    more than ||x_i|| ||w_j|| + ||x_j|| ||w_i||, by which rounding in the plain form is bounded too. First-order terms
    have the relative error of phi(x, w) as well: where it is below the range of normal numbers, they lose bits with it.
    """
    norms = torch.stack([_norms(x), _norms(w)])
    # One that is zero throughout counts as the smallest that matters beside the others.
    ratios = torch.where(norms > 0, norms.amax(1, keepdim=True) / norms, 2.0**48)
    dtype = x.primal.dtype
    most = -math.frexp(torch.finfo(dtype).tiny)[1]
    return (ratios.log2().sum(0) / 2).round().clamp(max=most).exp2().to(dtype)


def _norms(factor: HyperDual) -> Tensor:
    """[1 + K]: of the primal and of each tangent, in float64; what is not finite counts as zero."""
    finite = [torch.where(part.abs() < torch.inf, part, 0).flatten(1) for part in (factor.primal[None], factor.tangent)]
    return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in finite])
