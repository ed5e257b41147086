"""Directions: where the steps of an optimizer look, what is remembered of them, and their random state."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fomoh_fx.errors import ArgumentError
from fomoh_fx.low_rank import dense
from fomoh_fx.optim.samplers import SAMPLERS, Proposed, Sampler, Stacks, dimension_of, scaled, unit_scale


@dataclass(frozen=True)
class Batch:
    """What a step is given: the model's arguments and the loss's targets."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[Any, ...] | None

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments with which a transformed module is called."""
        return self.kwargs if self.targets is None else {**self.kwargs, "targets": self.targets}


class Directions(ABC):
    """The source of an optimizer's directions."""

    remembers: ClassVar[Sequence[str]] = ()  #: what :meth:`observe` reads and assigns
    settings: ClassVar[Sequence[str]] = ()

    @abstractmethod
    def propose(self, parameters: Mapping[str, Tensor], batch: Batch) -> Proposed:
        """The directions of the next step: name -> ``[K, *shape]``, or factors of that."""

    def observe(self, directions: Proposed, moved: Mapping[str, Tensor]) -> None:  # noqa: B027
        """What the step did: name -> change, zero where it was skipped or taken back."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on from here."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""


class RandomDirections(Directions):
    """K random directions for each step; with ``previous_step`` the last of them is the step before, normalised.

    Args:
        count: K; None for as many as there are real parameters.
        sampler: a name in :data:`~fomoh_fx.optim.samplers.SAMPLERS`, or a function like those.
        seed: of the directions' own generators, one for each device; None takes one from torch's default generator,
            so that ``torch.manual_seed`` decides.
        previous_step: whether the step before is one of the K directions (at the first step all of them are random).
    """

    remembers: ClassVar[Sequence[str]] = ("_previous",)
    settings: ClassVar[Sequence[str]] = ("previous_step",)

    def __init__(
        self, count: int | None, sampler: str | Sampler, seed: int | None = None, previous_step: bool = False
    ) -> None:
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ArgumentError(f"directions: expected a number of at least 1, got {count!r}")
        if not callable(sampler) and sampler not in SAMPLERS:
            raise ArgumentError(f"sampler: expected one of {tuple(SAMPLERS)} or a function, got {sampler!r}")
        self.count = count
        self.sampler: Sampler = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
        self.seed = int(torch.randint(2**62, ())) if seed is None else _whole(seed)
        self.previous_step = previous_step
        self._generators: dict[str, torch.Generator] = {}
        self._previous: Stacks = {}

    def propose(self, parameters: Mapping[str, Tensor], batch: Batch) -> Proposed:
        del batch
        count = dimension_of(parameters) if self.count is None else self.count
        drawn = self.sampler(parameters, count, self.generator)
        return self._with_previous({name: dense(v) for name, v in drawn.items()}) if self.previous_step else drawn

    def _with_previous(self, drawn: Stacks) -> Stacks:
        """The step before in place of the last direction, which is remembered where there is none."""
        for name, v in drawn.items():
            if name in self._previous:
                v[-1].copy_(self._previous[name])
            else:
                self._previous[name] = v[-1].clone()
        return drawn

    def observe(self, directions: Proposed, moved: Mapping[str, Tensor]) -> None:
        """A step that is zero leaves the last direction alone."""
        if not self.previous_step:
            return
        one = {name: change.unsqueeze(0) for name, change in moved.items()}
        scale = unit_scale(one)
        for name, change in scaled(one, scale).items():
            self._previous[name] = torch.where((scale[0] > 0).to(change.device), change[0], dense(directions[name])[-1])

    def state_dict(self) -> dict[str, Any]:
        """The seed, the state of each device's generator, and the step before."""
        return {
            "seed": self.seed,
            "generators": _states(self._generators),
            "previous_step": dict(self._previous),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seed, self._previous = state["seed"], dict(state["previous_step"])
        self._generators = _restored(state["generators"])

    def __getstate__(self) -> dict[str, Any]:
        """For copies: a generator has none of its own, its state has."""
        return {**self.__dict__, "_generators": _states(self._generators)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _generators=_restored(state["_generators"]))

    def generator(self, device: torch.device) -> torch.Generator:
        """One stream for each device, no two of them alike."""
        key = str(device)
        if key not in self._generators:
            self._generators[key] = torch.Generator(device).manual_seed(self.seed + len(self._generators))
        return self._generators[key]


def _whole(seed: Any) -> int:
    try:
        number = operator.index(seed)
    except TypeError:
        number = None
    if number is None or isinstance(seed, bool) or not -(2**63) <= number < 2**63:
        raise ArgumentError(f"seed: expected a whole number of 64 bits, or None, got {seed!r}")
    return number


def _states(generators: Mapping[str, torch.Generator]) -> dict[str, Tensor]:
    return {device: generator.get_state() for device, generator in generators.items()}


def _restored(states: Mapping[str, Tensor]) -> dict[str, torch.Generator]:
    return {device: torch.Generator(device).set_state(state.cpu()) for device, state in states.items()}
