"""Tangents of low rank, kept as their factors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class LowRank:
    """K tangents of a parameter ``[M, *rest]``, each the product of two factors: ``v_k = left_k right_k``.

    Products with such a parameter are taken factor by factor, x v_k^T = (x right_k^T) left_k^T, so that the K matrices
    are never multiplied out: a linear layer's directions cost next to nothing beside the layer itself. Where another
    operator meets the parameter, its tangents are multiplied out inside the graph.

    Attributes:
        left: ``[K, M, R]``, R the rank.
        right: ``[K, R, *rest]``.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> torch.Size:
        """``[K, M, *rest]``, that of the product."""
        return torch.Size((*self.left.shape[:2], *self.right.shape[2:]))

    @property
    def rank(self) -> int:
        """R."""
        return self.left.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        return self.left.device

    def dense(self) -> Tensor:
        """The product, ``[K, M, *rest]``."""
        k, r, *rest = self.right.shape
        return torch.bmm(self.left, self.right.reshape(k, r, math.prod(rest))).reshape(self.shape)

    def combined(self, weights: Tensor) -> Tensor:
        """sum_k weights_k v_k as one product over all ranks: [K] -> ``[M, *rest]``."""
        k, m, r = self.left.shape
        left = (self.left * weights.reshape(k, 1, 1)).movedim(0, 1).reshape(m, k * r)
        return (left @ self.right.reshape(k * r, math.prod(self.shape[2:]))).reshape(self.shape[1:])

    def contiguous(self) -> LowRank:
        return LowRank(self.left.contiguous(), self.right.contiguous())


pytree.register_pytree_node(
    LowRank, lambda v: ([v.left, v.right], None), lambda leaves, _: LowRank(*leaves),
    serialized_type_name="fomoh_fx.LowRank",
)  # fmt: skip


def dense(x: Any) -> Any:
    """A tangent as one tensor; anything else as it is."""
    return x.dense() if isinstance(x, LowRank) else x


def factors(stacks: Iterable[Tensor | LowRank]) -> list[Tensor]:
    """The tensors of stacks of tangents, in the order of a graph's inputs; Dynamo reads this."""
    flat: list[Tensor] = []
    for stack in stacks:
        flat += [stack.left, stack.right] if isinstance(stack, LowRank) else [stack]
    return flat
