"""Generators of random numbers of a model's own (``torch.Generator``), which a graph does not keep."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fomoh_fx.errors import CaptureError


class GeneratorsRefused(TorchFunctionMode):
    """Refuses a draw with a generator: where it is made anew or seeded in a call, a graph would draw on from it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(isinstance(value, torch.Generator) for value in (*args, *(kwargs or {}).values())):
            raise CaptureError(
                "model: draws with a torch.Generator of its own, which a graph does not keep. Draw with torch's "
                "default one, or pass the numbers as an argument"
            )
        return func(*args, **(kwargs or {}))
