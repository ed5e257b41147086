"""Gradient hooks: reverse mode calls them and goes on with what they return, so a graph without them would be wrong.

One that returns something is refused, wherever it is registered: on a tensor or an autograd node while the model runs,
on a module, on a parameter or an argument that has a tangent, or on the tensors that autograd saves. One that only
looks at a gradient, as every path through it returns None, changes no derivative and is not called.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.passes.provenance import is_hidden

_ADVICE = (
    "may change the derivative, which no forward pass does. Remove it, or write what it does as a "
    "torch.autograd.Function with an identity as its forward: its backward is honoured"
)


class _Handle:
    """What registering returns: nothing is registered."""

    def remove(self) -> None: ...

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Node:
    """An autograd node as the model sees it: its hooks are checked."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def register_hook(self, hook: Callable[..., Any]) -> _Handle:
        refuse_changing(hook, f"a hook on the autograd node {self._node.name()}")
        return _Handle()

    register_prehook = register_hook


def refuse_changing(hook: Callable[..., Any], where: str) -> None:
    """Refuse a gradient hook that may return another gradient.

    Raises:
        UnsupportedOpError: naming the hook and where it is.
    """
    if not _returns_nothing(hook):
        raise UnsupportedOpError(f"{where}, {getattr(hook, '__qualname__', repr(hook))}, {_ADVICE}")


def refuse_hooks_of(tensor: Tensor, name: str) -> None:
    """Refuse the gradient hooks on a tensor whose derivatives are asked for."""
    for hook in (tensor._backward_hooks or {}).values():
        refuse_changing(hook, f"a gradient hook on {name}")


def refuse_hooks_of_module(module: nn.Module) -> None:
    """Refuse the backward hooks of a module that is about to run, its own and the global ones."""
    full, others = module._get_backward_hooks()
    for hook in (*full, *others, *module._get_backward_pre_hooks()):
        refuse_changing(hook, f"a backward hook on {type(module).__name__}")


@contextmanager
def gradient_hooks_checked() -> Iterator[None]:
    """While a model runs: refuse hooks that may change a derivative, and let the others pass without an effect."""
    with ExitStack() as stack:
        for where, name, value in (
            (Tensor, "register_hook", _register_hook),
            (Tensor, "retain_grad", lambda self: None),
            (Tensor, "grad_fn", property(_grad_fn)),
            (torch.autograd.graph, "register_multi_grad_hook", lambda *_, **__: _Handle()),  # cannot change any
            (saved_tensors_hooks, "__enter__", _enter_saved_tensors_hooks),
        ):
            stack.enter_context(patch.object(where, name, value))
        yield


def _register_hook(self: Tensor, hook: Callable[..., Any]) -> _Handle:
    refuse_changing(hook, f"a gradient hook on a tensor of shape {tuple(self.shape)}")
    return _Handle()


def _grad_fn(self: Tensor) -> Any:
    is_asked_by_model = not is_hidden(sys._getframe(1).f_code.co_filename)
    if is_asked_by_model and (not self.requires_grad or self.is_leaf):
        return None
    node: Any = torch._C.TensorBase.grad_fn.__get__(self)  # type: ignore[union-attr]
    return _Node(node) if is_asked_by_model else node


_PUSH = saved_tensors_hooks.__enter__


def _enter_saved_tensors_hooks(self: saved_tensors_hooks) -> None:
    if type(self) is saved_tensors_hooks or not type(self).__module__.startswith("torch."):  # PyTorch's own keep values
        raise UnsupportedOpError(
            f"{type(self).__name__}, hooks on the tensors that autograd saves, may change the derivative, which no "
            "forward pass does; nothing is saved here, so leave them out"
        )
    _PUSH(self)


def _returns_nothing(hook: Callable[..., Any]) -> bool:
    """Whether it is a Python function that returns None on every path, by its code."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    code = getattr(hook, "__code__", None)
    if code is None or code.co_flags & (0x20 | 0x80 | 0x200):  # a generator or a coroutine
        return False
    before: dis.Instruction | None = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "RETURN_CONST" and instruction.argval is not None:
            return False
        if instruction.opname == "RETURN_VALUE" and (
            instruction.is_jump_target or before is None or before.opname != "LOAD_CONST" or before.argval is not None
        ):
            return False
        before = instruction
    return True
