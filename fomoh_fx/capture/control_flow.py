"""Higher-order operators while a model is captured.

PyTorch captures the branches of ``torch.cond``, ``while_loop``, ``scan`` and ``map`` with Dynamo, which cannot trace
through the modes that record what a trace would lose: they step aside meanwhile, and are back when the captured
branches run. What PyTorch does for reverse mode through them is left out, as for every other operator: its autograd
Functions would be taken for the model's own. ``flex_attention`` runs by its mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._C import DispatchKey, _AutoDispatchBelowAutograd, _len_torch_function_stack
from torch._higher_order_ops import utils
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from fomoh_fx.rules.flex_attention import dense_attention

_SETUP = utils.setup_compilation_env
_OPERATORS = [
    getattr(torch.ops.higher_order, name)
    for name in ("cond", "while_loop", "scan", "map_impl", "associative_scan", "invoke_subgraph")
]


@contextmanager
def higher_order_operators() -> Iterator[None]:
    """Let branches be captured although modes of ours are active."""
    replaced = {
        (utils, "setup_compilation_env"): _setup,
        (flex_attention, "flex_attention_hop"): dense_attention,
        (flex_attention, "setup_compilation_env"): nullcontext,
        (flex_attention, "_validate_device"): lambda *_: None,  # on a CPU it refuses tensors that require a gradient
        (flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"): True,
    }
    before: dict[Any, Any] = {where: getattr(*where) for where in replaced}
    for where, value in replaced.items():
        setattr(*where, value)
    try:
        with _without_autograd():
            yield
    finally:
        for where, value in before.items():
            setattr(*where, value)


@contextmanager
def _without_autograd() -> Iterator[None]:
    """The operators as they are where no argument requires a gradient."""

    def below(op: Any) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            with _AutoDispatchBelowAutograd():
                return op(*args, **kwargs)

        return kernel

    before = {op: op.py_kernels[DispatchKey.Autograd] for op in _OPERATORS}
    _use({op: below(op) for op in before})
    try:
        yield
    finally:
        _use(before)


def _use(kernels: dict[Any, Callable[..., Any]]) -> None:
    for op, kernel in kernels.items():
        op.py_kernels[DispatchKey.Autograd] = kernel
        op._dispatch_cache.clear()


@contextmanager
def _setup() -> Iterator[Callable[..., Any]]:
    with _aside() as modes, _SETUP() as backend:

        def under_modes(module: Any, inputs: Any, **options: Any) -> Callable[..., Any]:
            run = backend(module, inputs, **options)

            def function(*args: Any) -> Any:
                with _pushed(modes):
                    return run(*args)

            return function

        yield under_modes


@contextmanager
def _aside() -> Iterator[list[TorchFunctionMode]]:
    """Take the modes of this package out of the stack of modes."""
    stack = []
    while _len_torch_function_stack():
        stack.append(_pop_mode())
    stack.reverse()
    ours = [mode for mode in stack if type(mode).__module__.startswith("fomoh_fx.")]
    others = [mode for mode in stack if mode not in ours]
    try:
        with _pushed(others):
            yield ours
    finally:
        for mode in stack:
            _push_mode(mode)


@contextmanager
def _pushed(modes: list[TorchFunctionMode]) -> Iterator[None]:
    for mode in modes:
        _push_mode(mode)
    try:
        yield
    finally:
        for _ in modes:
            _pop_mode()
