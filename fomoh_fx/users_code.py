"""What is noticed of a user's code while it runs: the forward and the backward of a custom autograd Function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fomoh_fx.literals import KnownFactories, known_literals
from fomoh_fx.value_numbers import ValueNumbers


@contextmanager
def traced_code(stand_ins: Mapping[int, Tensor]) -> Iterator[None]:
    """While a forward is traced, what it writes out and computes alike is known; no other mode notices its calls."""
    with ExitStack() as stack:
        for _ in _get_current_function_mode_stack():
            stack.enter_context(_pop_mode_temporarily())
        stack.enter_context(torch._C._EnableTorchFunction())
        for mode in (known_literals(), KnownFactories(), ValueNumbers(), StandIns(stand_ins)):
            stack.enter_context(mode)
        yield


class StandIns(TorchFunctionMode):
    """Gives functions what stands for a tensor of the model, by identity: a module that a Function is given has it."""

    def __init__(self, by: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.by = by

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if self.by:
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: self.by.get(id(x), x), (args, kwargs))
        return func(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Notes whether random numbers are drawn, and whether the memory of one of the tensors is written to."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors, self.draws, self.changes = tensors, False, False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload):
            named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
            is_off = named.get("train") is False or named.get("training") is False  # dropout in evaluation
            self.draws |= torch.Tag.nondeterministic_seeded in func.tags and not is_off
            written = [named.get(a.name) for a in func._schema.arguments if a.is_write]
            changed = [leaf for leaf in pytree.tree_leaves(written) if isinstance(leaf, Tensor)]
            self.changes |= any(_share_memory(a, b) for a in changed for b in self.tensors)
        return func(*args, **kwargs)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or a.untyped_storage()._cdata == b.untyped_storage()._cdata


class Stops(TorchFunctionMode):
    """Records what a backward stops by ``detach`` or ``no_grad``: its derivative does not go on, as in reverse mode."""

    def __init__(self) -> None:
        super().__init__()
        self.differentiable = torch.is_grad_enabled()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        stops = func in _STOPS or func == torch.Tensor.data.__get__  # type: ignore[attr-defined]
        if self.differentiable and (stops or (not torch.is_grad_enabled() and func not in _GRAD_MODE)):
            return pytree.tree_map_only(Tensor, _stopped, out)
        return out


_STOPS = {torch.Tensor.detach, torch.detach}
_GRAD_MODE = {torch._C._set_grad_enabled}


def _stopped(x: Tensor) -> Tensor:
    is_stopped = x.is_floating_point() or x.is_complex()
    return torch.ops.fomoh_fx.stop_gradient.default(x) if is_stopped else x
