"""Lower: run the final graph as it is, or through torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx


def eager(module: fx.GraphModule) -> Callable[..., Any]:
    """The graph, operator by operator."""
    return module


def inductor(module: fx.GraphModule) -> Callable[..., Any]:
    """The graph as one program of torch.compile: no graph break is possible, no shape is dynamic."""
    return torch.compile(module, fullgraph=True, dynamic=False)
