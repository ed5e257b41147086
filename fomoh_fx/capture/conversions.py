"""Modules that a model converts while it runs, by ``self.layer.to(dtype)``: it changes the model itself, for good."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fomoh_fx.errors import CaptureError


@contextmanager
def conversions_checked(model: nn.Module) -> Iterator[None]:
    """Let conversions of the model's own modules pass where they change nothing, and refuse the others."""
    owned = {id(vars(m)) for m in model.modules()}  # a tracer wraps modules in others that share their attributes
    convert = nn.Module._apply

    def apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if id(vars(self)) not in owned:
            return convert(self, function, recurse)
        for tensor in (*self.parameters(recurse), *self.buffers(recurse)):
            with torch.no_grad():
                before, after = _kind(tensor), _kind(function(tensor))
            if before != after:
                raise CaptureError(
                    f"model: converts its {type(self).__name__} from {before} to {after} while it runs, which changes "
                    "the model; convert it beforehand, or run the model once before it is transformed"
                )
        return self

    nn.Module._apply = apply  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module._apply = convert  # type: ignore[method-assign]


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} on {tensor.device}"
