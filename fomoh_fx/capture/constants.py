"""Whole numbers that a model keeps in buffers (strides, sizes, steps) and that decide a branch or a shape.

Where nothing else could be captured, they count as constants of the model, like its plain attributes. One that the
model changes while it runs is none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fomoh_fx.capture.semantics import mutates


def whole_numbers(module: nn.Module) -> dict[str, Any]:
    """The values of the buffers that hold one integer or truth value, by name, as Python numbers or lists of one."""
    return {
        name: buffer.tolist()
        for name, buffer in module.named_buffers()
        if buffer.numel() == 1 and not (buffer.is_floating_point() or buffer.is_complex())
    }


class AsConstants(TorchFunctionMode):
    """Puts constants, whose values a frontend knows, in the place of buffers while a model runs under it.

    Attributes:
        changed: the names of those that the model changes.
    """

    def __init__(self, module: nn.Module, values: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.values = module, values
        self.changed: set[str] = set()
        self._put: dict[int, str] = {}
        self._before: list[tuple[str, dict[str, Any], str, Any, Tensor]] = []

    def __enter__(self) -> AsConstants:
        for name, value in self.values.items():
            parent, _, attribute = name.rpartition(".")
            buffers = self.module.get_submodule(parent)._buffers
            before = buffers[attribute]
            assert before is not None
            constant = torch.tensor(value, dtype=before.dtype, device=before.device)  # frontends know its value
            self._before.append((name, buffers, attribute, before, constant))
            self._put[id(constant)] = name
            buffers[attribute] = constant
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for name, buffers, attribute, before, constant in self._before:
            if buffers.get(attribute) is not constant:
                self.changed.add(name)
            buffers[attribute] = before

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if args and id(args[0]) in self._put and mutates(func):
            self.changed.add(self._put[id(args[0])])
        return func(*args, **(kwargs or {}))
