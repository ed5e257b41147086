"""Templates: the arguments of a call that is recorded, without their tensors.

Those whose values are known stay, written out, so that a body may branch on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fomoh_fx.literals import among_values, known, literal


@dataclass(frozen=True, eq=False)
class WrittenOut:
    """A tensor whose value is known when a call is recorded, so that the Function may branch on it."""

    value: Tensor


@dataclass(frozen=True)
class Template:
    """A pytree with its tensors taken out."""

    leaves: tuple[Any, ...]  # None where a tensor stands
    is_tensor: tuple[bool, ...]
    spec: pytree.TreeSpec

    @staticmethod
    def of(tree: Any) -> tuple[Template, list[Tensor]]:
        """The template, and the tensors."""
        leaves, spec = pytree.tree_flatten(tree)
        is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        others = tuple(None if t else leaf for t, leaf in zip(is_tensor, leaves, strict=True))
        return Template(others, is_tensor, spec), [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def tensors_of(self, tree: Any) -> list[Tensor]:
        """The tensors of another pytree of the same structure, in whose places the template has none."""
        leaves = pytree.tree_leaves(tree)
        return [leaf for leaf, is_tensor in zip(leaves, self.is_tensor, strict=True) if is_tensor]

    def has_leaves_of(self, other: Template) -> bool:
        """Whether both have the same structure around the same objects."""
        same = len(self.leaves) == len(other.leaves) and self.spec == other.spec and self.is_tensor == other.is_tensor
        return same and all(map(_is_same, self.leaves, other.leaves))

    def fill(self, tensors: Sequence[Any]) -> Any:
        """The pytree with other values in place of the tensors."""
        mine = iter(tensors)
        filled = [next(mine) if t else _written_out(leaf) for t, leaf in zip(self.is_tensor, self.leaves, strict=True)]
        return pytree.tree_unflatten(filled, self.spec)


def with_known(tree: Any) -> Any:
    """The arguments of a Function with :class:`WrittenOut` in place of tensors whose values are known."""

    def replaced(x: Tensor) -> Any:
        value = None if x.requires_grad else known(x)
        with among_values():
            return x if value is None else WrittenOut(value.clone())

    return pytree.tree_map_only(Tensor, replaced, tree)


def _written_out(leaf: Any) -> Any:
    return literal(leaf.value) if isinstance(leaf, WrittenOut) else leaf


def _is_same(a: Any, b: Any) -> bool:
    if not (isinstance(a, WrittenOut) and isinstance(b, WrittenOut)):
        return a is b
    with among_values():
        return a.value.dtype == b.value.dtype and torch.equal(a.value, b.value)
