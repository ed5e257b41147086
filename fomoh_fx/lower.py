"""Lower: run the final graph as it is, or through torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fomoh_fx.passes.outline import outline
from fomoh_fx.passes.pipeline import copy_of

#: From the final graph, and whether it has dynamic dimensions, to what is called.
Lowering = Callable[[fx.GraphModule, bool], Callable[..., Any]]


def eager(module: fx.GraphModule, dynamic: bool) -> Callable[..., Any]:
    """The graph, operator by operator."""
    return module


def inductor(module: fx.GraphModule, dynamic: bool, **options: Any) -> Callable[..., Any]:
    """The graph as one program of torch.compile, without a graph break; layers that repeat are compiled once.

    With dynamic dimensions every layer is compiled, for Dynamo cannot yet call a region again with a symbol that became
    a number (``KeyError`` in ``stamp_out_subgraph``). So it is for inputs that share memory, such as parts of one flat
    vector: no two operands of a region may.
    """
    compiled = partial(torch.compile, fullgraph=True, dynamic=dynamic, **options)
    if dynamic:
        return compiled(module)
    layers = outline(copy_of(module))
    if len(layers.graph.nodes) == len(module.graph.nodes):  # nothing repeats
        return compiled(layers)
    whole, by_regions = compiled(copy_of(module)), compiled(layers)

    def run(*inputs: Tensor) -> Any:
        return whole(*inputs) if torch.compiler.is_compiling() or _share_memory(inputs) else by_regions(*inputs)

    return run


def asked_for(compiled: nn.Module) -> Lowering | None:
    """The lowering of what ``torch.compile`` returned, with the caller's backend, mode and options; None if unknown."""
    backend: Any = getattr(getattr(compiled, "dynamo_ctx", None), "callback", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):  # Dynamo's own wrappers
        backend = backend._torchdynamo_orig_backend
    options = getattr(backend, "config", None)
    if getattr(backend, "compiler_name", None) == "inductor" and isinstance(options, dict):
        return partial(inductor, options=options) if options else inductor
    return partial(inductor, backend=backend) if hasattr(backend, "compiler_fn") else None


def uses_inductor(lowering: Lowering) -> bool:
    """Whether programs may be lowered by Inductor: the caller has asked for it, or for no other backend."""
    return lowering is not eager and getattr(lowering, "keywords", {}).get("backend", "inductor") == "inductor"


def _share_memory(tensors: Sequence[Tensor]) -> bool:
    return len({x.untyped_storage()._cdata for x in tensors}) < len(tensors)
