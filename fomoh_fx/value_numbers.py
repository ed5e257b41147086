"""Value numbers of a user's code that runs without values: which of its tensors are computed alike."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fomoh_fx.passes.dataflow import draws


class ValueNumbers(TorchDispatchMode):
    """Answers ``torch.equal`` of fake tensors that are computed alike: they are equal, or hold what is no number.

    Tensors have the same number where one operator computes both, from the same numbers (Cocke and Schwartz 1970).
    """

    def __init__(self) -> None:
        super().__init__()
        self._forget()
        self._fresh = count()

    def _forget(self) -> None:
        self._of: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._computed: dict[Hashable, int] = {}

    def _number(self, x: Tensor) -> int:
        return self._of.setdefault(x, next(self._fresh))

    def _are_alike(self, a: Tensor, b: Tensor) -> bool:
        return isinstance(a, FakeTensor) and isinstance(b, FakeTensor) and self._number(a) == self._number(b)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.equal.default and self._are_alike(*args):
            return True
        out = func(*args, **kwargs)
        if not isinstance(func, OpOverload) or func._schema.is_mutable:
            self._forget()  # whatever shares the memory has another value
        elif not draws(func):
            leaves, spec = pytree.tree_flatten((args, kwargs))
            given = tuple(self._number(x) if isinstance(x, Tensor) else (type(x), repr(x)) for x in leaves)
            for i, result in enumerate(pytree.tree_leaves(out)):
                if isinstance(result, Tensor):
                    key = func, given, str(spec), i
                    self._of[result] = self._computed.setdefault(key, next(self._fresh))
        return out
