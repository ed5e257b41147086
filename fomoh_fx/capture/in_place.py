"""Plain data that change in place and are no containers of tensors: sets, bytearrays, NumPy's arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fomoh_fx.capture.reading import are_equal, is_small_array


class Snapshot:
    """What such data were, to see whether they have changed, and to put them back.

    Attributes:
        value: the data themselves.
        before: a copy.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self.before = self.now()

    @classmethod
    def of(cls, value: Any) -> Snapshot | None:
        """Of data of these kinds, None for anything else, and for arrays that are read by identity alone."""
        return cls(value) if isinstance(value, (set, bytearray)) or is_small_array(value) else None

    def now(self) -> Any:
        """A copy of what they are now."""
        return self.value.copy()

    def has_changed(self) -> bool:
        """Whether they are others than before."""
        if isinstance(self.value, set):  # equal tensors are not one; 1 and 1.0 are not equal for a model
            return self.value != self.before or not are_equal(self.value, self.before)
        if not isinstance(self.value, bytearray) and self.value.dtype.hasobject:
            return any(a is not b for a, b in zip(self.value.flat, self.before.flat, strict=True))
        return not are_equal(self.value, self.before)

    def elements(self) -> Iterable[Any]:
        """What is in a set or in an array of objects."""
        if isinstance(self.value, set):
            return self.value
        return self.value.flat if not isinstance(self.value, bytearray) and self.value.dtype.hasobject else ()

    def has_tensors(self) -> bool:
        """Whether a tensor is in it now that was not before."""
        return any(isinstance(x, Tensor) for x in self.elements())

    def put(self, other: Any) -> None:
        """Let them be what the copy is."""
        if isinstance(self.value, set):
            self.value.clear()
            self.value.update(other)
        else:
            self.value[slice(None) if isinstance(self.value, bytearray) else ...] = other
