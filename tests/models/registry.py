"""The registry of small models with torch alone: an entry builds one in float64 with a call of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.models.checking import Problem

Builder = Callable[[], Problem]
PROBLEMS: dict[str, Builder] = {}


def problem(builder: Builder) -> Builder:
    """Enter the builder under its own name; every build draws the same numbers."""

    def seeded() -> Problem:
        torch.manual_seed(0)
        built = builder()
        built.model.double()
        return built

    PROBLEMS[builder.__name__] = seeded
    return seeded


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
