"""The operators that capture adds to PyTorch's: facts about derivatives that a trace of values would lose.

- ``fomoh_fx::stop_gradient(x)`` is x with derivative zero: ``detach``, ``.data``, and every result under ``no_grad``.
- ``fomoh_fx::with_value(x, value)`` has the derivative of x and another value: x changed in place under ``no_grad``.
"""

from __future__ import annotations

import torch
from torch import Tensor

library = torch.library.Library("fomoh_fx", "DEF")
library.define("stop_gradient(Tensor x) -> Tensor")
library.define("with_value(Tensor x, Tensor value) -> Tensor")
library.impl("stop_gradient", lambda x: x.clone(), "CompositeExplicitAutograd")
library.impl("with_value", lambda x, value: value.clone(), "CompositeExplicitAutograd")

torch.library.register_vmap("fomoh_fx::stop_gradient", lambda info, dims, x: (x.clone(), dims[0]), lib=library)


def _stop_gradient_under_autograd(x: Tensor) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fomoh_fx.stop_gradient.default(x)


library.impl("stop_gradient", _stop_gradient_under_autograd, "Autograd")  # a model may call torch.autograd.grad itself
