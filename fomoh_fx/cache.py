"""The specialisations that are kept: found again by their signatures, dropped where there are too many."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")

#: How many a module keeps.
MOST = 64


@dataclass
class Cache(Generic[T]):
    """Specialisations by signature; several have one where values decide. The least recently used ones are dropped.

    ``torch.compile`` gives up beyond its ``recompile_limit`` and runs the model itself, which has no derivative here:
    a call whose specialisation was dropped captures it again, and a warning says once that this happens.

    Attributes:
        values: each once, in the order of their capture. Dynamo reads this, so a use does not change it.
    """

    values: list[T] = field(default_factory=list)
    _by_signature: dict[Hashable, list[T]] = field(default_factory=dict)
    _used: dict[int, int] = field(default_factory=dict)  # by identity: when, as the clock tells
    _clock: count[int] = field(default_factory=count)
    _has_warned: bool = False

    def find(self, signature: Hashable, holds: Callable[[T], bool]) -> T | None:
        """The newest one with the signature for which ``holds``; it counts as used."""
        for value in self._by_signature.get(signature, ()):
            if holds(value):
                self._used[id(value)] = next(self._clock)
                return value
        return None

    def add(self, signature: Hashable, value: T, most: int = MOST) -> None:
        """Keep one under this signature, too, and no more than ``most`` in all, none below 1; it counts as used."""
        most = max(most, 0)
        self._by_signature.setdefault(signature, []).insert(0, value)
        if id(value) not in self._used:
            self.values.append(value)
        self._used[id(value)] = next(self._clock)
        while len(self.values) > most:
            self._drop(min(self.values, key=lambda v: self._used[id(v)]))
            self._warn(most)

    def _drop(self, value: T) -> None:
        del self._used[id(value)]
        self.values[:] = [v for v in self.values if v is not value]
        for signature, known in list(self._by_signature.items()):
            known[:] = [v for v in known if v is not value]
            if not known:
                del self._by_signature[signature]

    def _warn(self, most: int) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"more than {most} specialisations of one module: the least recently used ones are dropped, and captured "
            "again where they are needed. Where sizes differ, mark the dimension as dynamic (trace(..., "
            "dynamic_shapes=...)); where values of tensors decide, pad to fewer cases; or set hd.most_specializations",
            stacklevel=9,
        )
