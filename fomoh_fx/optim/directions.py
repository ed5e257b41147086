"""Directions: where the steps of an optimizer look, what is remembered of them, and their random state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from fomoh_fx import lower
from fomoh_fx.errors import ArgumentError
from fomoh_fx.low_rank import dense
from fomoh_fx.optim.checks import is_bool
from fomoh_fx.optim.samplers import SAMPLERS, Proposed, Sampler, Stacks, dimension_of, scaled, unit_scale
from fomoh_fx.optim.streams import Streams
from fomoh_fx.passes.retrace import without_autocast


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

    @property
    def follows(self) -> bool:
        """Whether :meth:`observe` looks at what the step did."""
        return True

    def lower(self, lowering: lower.Lowering) -> None:  # noqa: B027
        """How the steps are lowered; called once, by the optimizer."""

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
        seed: of the directions' own :class:`~fomoh_fx.optim.streams.Streams`.
        previous_step: whether the step before is one of the K directions, of which there are then 2 or more (at the
            first step all of them are random).
    """

    remembers: ClassVar[Sequence[str]] = ("_previous",)
    settings: ClassVar[Sequence[str]] = ("previous_step",)

    def __init__(
        self, count: int | None, sampler: str | Sampler, seed: int | None = None, previous_step: bool = False
    ) -> None:
        if count is not None and (isinstance(count, bool) or not isinstance(count, Integral) or count < 1):
            raise ArgumentError(f"directions: expected a number of at least 1, got {count!r}")
        if not callable(sampler) and (not isinstance(sampler, str) or sampler not in SAMPLERS):
            known = f'{tuple(SAMPLERS)}, of FoMoHKD also "activity",'
            raise ArgumentError(f"sampler: expected one of {known} or a function, got {sampler!r}")
        is_bool("previous_step", previous_step)
        if previous_step and count == 1:
            raise ArgumentError(
                "directions: with previous_step=True the last one is the step before, which alone would never change; "
                "give 2 or more, or previous_step=False"
            )
        self.count = None if count is None else int(count)
        self.sampler: Sampler = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
        self.streams = Streams(seed)
        self.previous_step = previous_step
        self._previous: Stacks = {}

    @property
    def follows(self) -> bool:
        return self.previous_step

    def lower(self, lowering: lower.Lowering) -> None:
        self.streams.lowered = lower.uses_inductor(lowering)

    def propose(self, parameters: Mapping[str, Tensor], batch: Batch) -> Proposed:
        del batch
        count = dimension_of(parameters) if self.count is None else self.count
        with without_autocast():
            drawn = self.sampler(parameters, count, self.streams)
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
        """The state of the streams, and the step before."""
        return {**self.streams.state_dict(), "previous_step": dict(self._previous)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.streams.load_state_dict(state)
        self._previous = dict(state["previous_step"])
