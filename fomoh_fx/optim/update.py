"""Update: theta <- (1 - lr decay) theta + lr sum_i kappa_i v_i, where everything is finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fomoh_fx.low_rank import LowRank


def update(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor | LowRank],
    kappa: Tensor,
    rates: Sequence[Tensor],
    decays: Mapping[int, Tensor],
    needed: Sequence[Tensor],
    decay_now: bool = True,
) -> list[Tensor]:
    """Move the parameters in place if they and all that is needed are finite.

    Args:
        parameters: what moves.
        directions: [K, *shape] for each, or the factors.
        kappa: [K].
        rates: lr for each parameter, 0-dim.
        decays: lr decay, 0-dim, by the number of each parameter that decays.
        needed: what else has to be finite.
        decay_now: False leaves the decay to the caller, who looks at the loss before it.

    Returns:
        Whether they have moved, a 0-dim bool, and the change of every parameter without its decay.
    """
    moved, proposed, there = [], [], []
    for i, (p, v, rate) in enumerate(zip(parameters, directions, rates, strict=True)):
        change = (_combined(kappa, v) * rate).to(p.dtype)
        moved.append(change)
        proposed.append((p * (1 - decays[i]) if i in decays else p) + change)
        there.append(proposed[i] if decay_now or i not in decays else p + change)
    valid = all_finite([*needed, *proposed])
    for p, new in zip(parameters, there, strict=True):
        p.copy_(torch.where(valid.to(p.device), new, p))
    return [valid, *(torch.where(valid.to(change.device), change, 0) for change in moved)]


def settle(
    stays: Tensor,
    parameters: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    changes: Mapping[str, Tensor],
    decays: Mapping[int, Tensor],
) -> None:
    """Take the step back unless it ``stays``, a 0-dim bool; where it does, let the weights decay.

    Args:
        stays: whether the parameters are those that the step led to.
        parameters: by name, changed in place.
        before: what they were.
        changes: what the step was, where there are decays.
        decays: lr decay, 0-dim, by the number of each parameter that decays.
    """
    for i, (name, old) in enumerate(before.items()):
        p = parameters[name]
        there = old * (1 - decays[i]) + changes[name] if i in decays else p
        p.copy_(torch.where(stays.to(p.device), there, old))


def _combined(kappa: Tensor, v: Tensor | LowRank) -> Tensor:
    """sum_i kappa_i v_i."""
    if isinstance(v, LowRank):
        return v.combined(kappa.to(v.left))
    return torch.tensordot(kappa.to(v), v, 1)


def all_finite(values: Sequence[Tensor]) -> Tensor:
    """Whether every element is finite: a 0-dim tensor on the first one's device."""
    return torch.stack([v.isfinite().all().to(values[0].device) for v in values]).all()
