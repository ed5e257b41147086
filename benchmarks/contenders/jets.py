"""jet-for-pytorch: collapsed Taylor mode for Laplacians."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders.base import Absent, Local, Options


def package(options: Options) -> Any:
    folder = None if options.jet is None else str(options.jet)
    if folder and folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module("jet")
    except ImportError as error:
        raise Absent(f"pip install jet-for-pytorch, or give its folder with --jet ({error})") from error
    except SyntaxError as error:
        raise Absent("jet-for-pytorch needs Python 3.12") from error


def laplacian(model: nn.Module, x: Tensor, options: Options) -> Local:
    """As its own benchmark calls it: the graph of one sample without repeated expressions, vmapped, compiled."""
    jet = package(options)
    graph, _ = jet.capture_graph(jet.laplacian(model, (x[0],), collapsed=True), (x[0],))
    jet.common_subexpression_elimination(graph.graph)
    graph.recompile()
    run = options.compile(torch.vmap(graph))

    @torch.no_grad()
    def evaluate() -> Tensor:
        return run(x)

    return Local(evaluate, x.device, lambda value: {"laplacian": value})
