"""Lower: run the final graph as it is, or through torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

Lowering = Callable[[fx.GraphModule], Callable[..., Any]]


def eager(module: fx.GraphModule) -> Callable[..., Any]:
    """The graph, operator by operator."""
    return module


def inductor(module: fx.GraphModule, **options: Any) -> Callable[..., Any]:
    """The graph as one program of torch.compile: a graph break or a dynamic shape is impossible."""
    return torch.compile(module, fullgraph=True, dynamic=False, **options)
