"""Branches on whether values are finite: ``if not torch.isfinite(x).all(): x = x.clamp(..)``.

They repair what has overflowed. The branch for finite values is captured, and the graph asserts that they are.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fomoh_fx.passes.provenance import source_line

#: Elementwise tests, and what they say of a finite value.
_TESTS: dict[Any, bool] = {
    torch.isfinite: True,
    torch.Tensor.isfinite: True,
    torch.isinf: False,
    torch.Tensor.isinf: False,
    torch.isnan: False,
    torch.Tensor.isnan: False,
}
#: Reductions to one answer that finite values decide.
_DECIDED = {torch.all: True, torch.Tensor.all: True, torch.any: False, torch.Tensor.any: False}
_BRANCHES = {torch.Tensor.__bool__, torch.Tensor.item}


class AssumeFinite(TorchFunctionMode):
    """Answers such questions, while a model is captured, with an assertion in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self._answers: dict[int, tuple[Tensor, bool]] = {}  # by id, with the tensor so that the id stays its own

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        known = self._answers.get(id(args[0])) if args else None
        if known is not None and func in _BRANCHES:
            return self._assumed(*known)
        out = func(*args, **(kwargs or {}))
        if func in _TESTS:
            self._answers[id(out)] = (out, _TESTS[func])
        elif known is not None and len(args) == 1 and not kwargs and _DECIDED.get(func) == known[1]:
            self._answers[id(out)] = (out, known[1])
        return out

    @staticmethod
    def _assumed(test: Tensor, answer: bool) -> bool:
        where = source_line("".join(traceback.format_stack()))
        holds = test if answer else test.logical_not()
        torch._assert_async(holds, f"values are not finite, but the branch for finite ones was captured (at {where})")
        return answer
