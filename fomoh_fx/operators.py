"""The operators that capture adds to PyTorch's: facts about derivatives that a trace of values would lose.

- ``fomoh_fx::stop_gradient(x)`` is x with derivative zero: ``detach``, ``.data``, and every result under ``no_grad``.
- ``fomoh_fx::with_value(x, value)`` has the derivative of x and another value: x changed in place under ``no_grad``.
- ``fomoh_fx::custom_function(inputs, call)`` is one call of a ``torch.autograd.Function``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

library = torch.library.Library("fomoh_fx", "DEF")
library.define("stop_gradient(Tensor x) -> Tensor")
library.define("with_value(Tensor x, Tensor value) -> Tensor")
library.define("custom_function(Tensor[] inputs, int call) -> Tensor[]")
library.impl("stop_gradient", lambda x: x.clone(), "CompositeExplicitAutograd")
library.impl("with_value", lambda x, value: value.clone(), "CompositeExplicitAutograd")


def _stop_gradient_under_autograd(x: Tensor) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fomoh_fx.stop_gradient.default(x)


library.impl("stop_gradient", _stop_gradient_under_autograd, "Autograd")  # a model may call torch.autograd.grad itself

CALLS: dict[int, FunctionCall] = {}


@dataclass
class FunctionCall:
    """One call of a custom Function: the class, and its arguments with the tensors taken out."""

    function: type[torch.autograd.Function]
    leaves: tuple[Any, ...]  # None where a tensor stands
    is_tensor: tuple[bool, ...]
    spec: pytree.TreeSpec
    returns_tensor: bool = False  # one tensor, not a tuple; known once it has run

    def __post_init__(self) -> None:
        self.number = len(CALLS)
        CALLS[self.number] = self

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Apply the Function, with its own backward, to other tensors."""
        mine = iter(tensors)
        filled = [next(mine) if t else leaf for t, leaf in zip(self.is_tensor, self.leaves, strict=True)]
        out = apply_function(self.function, *pytree.tree_unflatten(filled, self.spec))
        self.returns_tensor = isinstance(out, Tensor)
        return [out] if self.returns_tensor else list(out)


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` as PyTorch does it, also while capture records such calls instead."""
    return torch._C._FunctionBase.__dict__["apply"].__get__(None, function)(*args)


def _run_custom_function(inputs: list[Tensor], call: int) -> list[Tensor]:
    with torch.no_grad():
        return [out.clone() for out in CALLS[call](inputs)]


library.impl("custom_function", _run_custom_function, "CompositeExplicitAutograd")
