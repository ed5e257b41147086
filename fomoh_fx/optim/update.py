"""Update: theta <- (1 - lr decay) theta + lr sum_i kappa_i v_i, where everything is finite, as one program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fomoh_fx import lower

#: A product of a row and a stack of directions is a sum that fuses with what follows it, where a program is lowered.
_FUSIBLE = {torch.ops.aten.mm.default: lambda a, b: (a.unsqueeze(-1) * b).sum(-2)}


def update(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    kappa: Tensor,
    rates: Sequence[Tensor],
    decays: Mapping[int, Tensor],
    needed: Sequence[Tensor],
) -> list[Tensor]:
    """Move the parameters in place if they and all that is needed are finite.

    Args:
        parameters: what moves.
        directions: [K, *shape] for each.
        kappa: [K].
        rates: lr for each parameter, 0-dim.
        decays: lr decay, 0-dim, by the number of each parameter that decays.
        needed: what else has to be finite.

    Returns:
        Whether they have moved, a 0-dim bool, and the change of every parameter without its decay.
    """
    moved, proposed = [], []
    for i, (p, v, rate) in enumerate(zip(parameters, directions, rates, strict=True)):
        change = (torch.tensordot(kappa.to(v), v, 1) * rate).to(p.dtype)
        moved.append(change)
        proposed.append((p * (1 - decays[i]) if i in decays else p) + change)
    valid = all_finite([*needed, *proposed])
    for p, there in zip(parameters, proposed, strict=True):
        p.copy_(torch.where(valid.to(p.device), there, p))
    return [valid, *(torch.where(valid.to(change.device), change, 0) for change in moved)]


def all_finite(values: Sequence[Tensor]) -> Tensor:
    """Whether every element is finite: a 0-dim tensor on the first one's device."""
    return torch.stack([v.isfinite().all().to(values[0].device) for v in values]).all()


class Update:
    """:func:`update`, lowered as the evaluation is; traced once for parameters and directions of the same kind."""

    def __init__(self, lowering: lower.Lowering) -> None:
        self.lowering = lowering
        self._programs: dict[Any, Callable[..., list[Tensor]]] = {}

    def __call__(self, *arguments: Any) -> list[Tensor]:
        if self.lowering is lower.eager:
            return update(*arguments)
        leaves, spec = pytree.tree_flatten(arguments)
        key = spec, tuple((leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in leaves)
        if key not in self._programs:

            def flat(*leaves: Tensor) -> list[Tensor]:
                return update(*pytree.tree_unflatten(leaves, spec))

            self._programs[key] = self.lowering(make_fx(flat, _FUSIBLE, "fake")(*leaves), False)
        return self._programs[key](*leaves)
