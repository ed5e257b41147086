"""Directions: where a step looks.

A sampler draws K directions over all parameters together, scaled so that E[v v^T] is the identity: a directional
derivative times its direction is then, on average, the gradient. :class:`RandomDirections` keeps the random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.errors import ArgumentError

Stacks = dict[str, Tensor]
GeneratorOf = Callable[[torch.device], torch.Generator]
Sampler = Callable[[Mapping[str, Tensor], int, GeneratorOf], Stacks]


def normal(parameters: Mapping[str, Tensor], count: int, generator: GeneratorOf) -> Stacks:
    """v ~ N(0, I)."""
    return _drawn(parameters, count, lambda v: v.normal_(generator=generator(v.device)))


def rademacher(parameters: Mapping[str, Tensor], count: int, generator: GeneratorOf) -> Stacks:
    """Every element +1 or -1: of all independent elements, the ones whose estimates vary least."""
    return _drawn(parameters, count, lambda v: v.bernoulli_(0.5, generator=generator(v.device)).mul_(2).sub_(1))


def sphere(parameters: Mapping[str, Tensor], count: int, generator: GeneratorOf) -> Stacks:
    """Uniform on the sphere of radius sqrt(n), n the number of real parameters."""
    drawn = normal(parameters, count, generator)
    scale = math.sqrt(_dimension(parameters)) / norms(drawn)
    return {name: v * scale.to(v).reshape(-1, *[1] * (v.dim() - 1)) for name, v in drawn.items()}


def orthogonal(parameters: Mapping[str, Tensor], count: int, generator: GeneratorOf) -> Stacks:
    """Each one uniform on the sphere of radius sqrt(n), and all of them mutually orthogonal."""
    dimension = _dimension(parameters)
    if count > dimension:
        raise ArgumentError(f"directions: {count} orthogonal directions do not fit into {dimension} parameters")
    drawn = normal(parameters, count, generator)
    rows = [_rows(v) for v in drawn.values()]
    flat = torch.cat([row.to(rows[0].device) for row in rows], 1)
    flat = torch.linalg.qr(flat.to(torch.promote_types(flat.dtype, torch.float32)).mT).Q.mT * math.sqrt(dimension)
    parts = flat.split([row.shape[1] for row in rows], 1)
    return {name: _like(part, v) for part, (name, v) in zip(parts, drawn.items(), strict=True)}


SAMPLERS: dict[str, Sampler] = {
    "normal": normal,
    "rademacher": rademacher,
    "sphere": sphere,
    "orthogonal": orthogonal,
}


@dataclass(frozen=True)
class Batch:
    """What a step is given: the model's arguments and the loss's targets."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[Any, ...]


class RandomDirections:
    """K random directions for each step; with ``previous_step`` the last of them is the step before, normalised.

    Args:
        count: K.
        sampler: a name in :data:`SAMPLERS`, or a function like those.
        seed: of the directions' own generators, one for each device; None takes one from torch's default generator,
            so that ``torch.manual_seed`` decides.
        previous_step: whether the step before is one of the K directions (at the first step all of them are random).
    """

    def __init__(
        self, count: int, sampler: str | Sampler, seed: int | None = None, previous_step: bool = False
    ) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ArgumentError(f"directions: expected a number of at least 1, got {count!r}")
        if not callable(sampler) and sampler not in SAMPLERS:
            raise ArgumentError(f"sampler: expected one of {tuple(SAMPLERS)} or a function, got {sampler!r}")
        self.count = count
        self.sampler: Sampler = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self.previous_step = previous_step
        self._generators: dict[str, torch.Generator] = {}
        self._previous: Stacks = {}

    def propose(self, parameters: Mapping[str, Tensor], batch: Batch | None = None) -> Stacks:
        """The directions of the next step: name -> ``[K, *shape]``."""
        drawn = self.sampler(parameters, self.count, self._generator)
        for name, v in drawn.items():
            if name in self._previous:
                v[-1].copy_(self._previous[name])
        return drawn

    def observe(self, directions: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> None:
        """What the step did: name -> change. A step that is zero (a skipped one) leaves the last direction alone."""
        if not self.previous_step:
            return
        one = {name: change.unsqueeze(0) for name, change in moved.items()}
        norm = norms(one)[0]
        scale = math.sqrt(_dimension(moved)) / torch.where(norm > 0, norm, 1)
        for name, change in moved.items():
            kept, to = directions[name][-1], change.device
            self._previous[name] = torch.where((norm > 0).to(to), change * scale.to(change), kept)

    def state_dict(self) -> dict[str, Any]:
        """The seed, the state of each device's generator, and the step before."""
        states = {device: generator.get_state() for device, generator in self._generators.items()}
        return {"seed": self.seed, "generators": states, "previous_step": dict(self._previous)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self.seed, self._previous, self._generators = state["seed"], dict(state["previous_step"]), {}
        for device, saved in state["generators"].items():
            self._generators[device] = torch.Generator(device)
            self._generators[device].set_state(saved.cpu())

    def _generator(self, device: torch.device) -> torch.Generator:
        """One stream for each device, no two of them alike."""
        key = str(device)
        if key not in self._generators:
            self._generators[key] = torch.Generator(device).manual_seed(self.seed + len(self._generators))
        return self._generators[key]


def norms(stacks: Mapping[str, Tensor]) -> Tensor:
    """||v_i|| of each direction over all parameters: [K], in at least float32."""
    parts = [_rows(v) for v in stacks.values()]
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    first = parts[0].device
    each = torch.stack([torch.linalg.vector_norm(p, dim=1, dtype=wide).to(first) for p in parts])
    return torch.linalg.vector_norm(each, dim=0)


def _drawn(parameters: Mapping[str, Tensor], count: int, fill: Callable[[Tensor], Tensor]) -> Stacks:
    """A stack for each parameter; a complex one has independent real and imaginary parts."""
    drawn = {}
    for name, p in parameters.items():
        real = torch.view_as_real(p.detach()) if p.is_complex() else p
        v = fill(torch.empty(count, *real.shape, dtype=real.dtype, device=real.device))
        drawn[name] = torch.view_as_complex(v) if p.is_complex() else v
    return drawn


def _dimension(parameters: Mapping[str, Tensor]) -> int:
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in parameters.values())


def _rows(v: Tensor) -> Tensor:
    """[K, *shape] as the real matrix [K, n]."""
    return (torch.view_as_real(v) if v.is_complex() else v).reshape(v.shape[0], -1)


def _like(rows: Tensor, v: Tensor) -> Tensor:
    """The inverse of :func:`_rows`, in the dtype, shape and place of ``v``."""
    if v.is_complex():
        return torch.view_as_complex(rows.reshape(*v.shape, 2).contiguous()).to(v)
    return rows.reshape(v.shape).contiguous().to(v)
