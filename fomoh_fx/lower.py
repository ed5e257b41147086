"""Lower: run the final graph as it is, or through torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

#: From the final graph, and whether it has dynamic dimensions, to what is called.
Lowering = Callable[[fx.GraphModule, bool], Callable[..., Any]]


def eager(module: fx.GraphModule, dynamic: bool) -> Callable[..., Any]:
    """The graph, operator by operator."""
    return module


def inductor(module: fx.GraphModule, dynamic: bool, **options: Any) -> Callable[..., Any]:
    """The graph as one program of torch.compile, without a graph break."""
    return torch.compile(module, fullgraph=True, dynamic=dynamic, **options)
