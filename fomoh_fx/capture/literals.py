"""Values computed from tensors that the model writes out (``torch.tensor([0, 2])``) may decide branches and shapes.

Fake tensors know such values until something else is written there. The tracer's own record is left out: it misses
what is written through a view.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._ops import OpOverload
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import proxy_tensor

from fomoh_fx.capture.constants import MOST
from fomoh_fx.custom_functions import namespace
from fomoh_fx.passes.retrace import is_composite_implicit

aten = torch.ops.aten
_NOTHING = -1


@contextmanager
def known_literals() -> Iterator[None]:
    """Let fake tensors know the values of what the model writes out, and of what it computes from them.

    What PyTorch computes inside an operator that has other arguments as well is for shapes alone: an uninitialised
    tensor, a copy of an argument. Fake tensors would know the values of those, too, and take them for the result's.
    Where an index is true is a shape.
    """
    run, most = FakeTensorMode._dispatch_impl, MOST

    def dispatch(mode: FakeTensorMode, func: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal most
        before, fake_tensor.CONSTANT_NUMEL_LIMIT = most, MOST if func is aten.nonzero.default else most
        most = _NOTHING if _is_for_shapes(func) else most
        try:
            return run(mode, func, *args, **kwargs)
        finally:
            most = fake_tensor.CONSTANT_NUMEL_LIMIT = before

    with (
        patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", MOST),
        patch.object(proxy_tensor, "CONSTANT_NUMEL_LIMIT", _NOTHING),
        patch.object(FakeTensorMode, "_dispatch_impl", dispatch),
    ):
        yield


def _is_for_shapes(func: Any) -> bool:
    """Whether what runs inside the operator computes no values: it is no body of operators, and not a user's code."""
    return isinstance(func, OpOverload) and not is_composite_implicit(func) and func.namespace != namespace.name
