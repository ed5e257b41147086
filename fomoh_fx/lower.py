"""Lower: run the final graph as it is, or through torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fomoh_fx.passes.outline import outline
from fomoh_fx.passes.pipeline import copy_of

#: From the final graph, and whether it has dynamic dimensions, to what is called.
Lowering = Callable[[fx.GraphModule, bool], Callable[..., Any]]


def eager(module: fx.GraphModule, dynamic: bool) -> Callable[..., Any]:
    """The graph, operator by operator."""
    return module


def inductor(module: fx.GraphModule, dynamic: bool, **options: Any) -> Callable[..., Any]:
    """The graph as one program of torch.compile, without a graph break; layers that repeat are compiled once.

    With dynamic dimensions every layer is compiled: Dynamo cannot yet call a region again with a symbol that became a
    number (``KeyError`` in ``stamp_out_subgraph``).
    """
    repeated_once = module if dynamic else outline(copy_of(module))
    return torch.compile(repeated_once, fullgraph=True, dynamic=dynamic, **options)
