"""Numbers that users give."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

from fomoh_fx.errors import ArgumentError


def at_least_zero(name: str, value: Any) -> None:
    """Raise an ArgumentError that begins with ``name`` unless the value is a finite number of at least zero."""
    is_number = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)
    if not is_number or not 0 <= value < math.inf:
        raise ArgumentError(f"{name}: expected a finite number of at least 0, got {value!r}")


def is_bool(name: str, value: Any) -> None:
    """Raise an ArgumentError that begins with ``name`` unless the value is True or False."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name}: expected True or False, got {value!r}")
