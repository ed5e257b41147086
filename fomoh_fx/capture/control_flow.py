"""Higher-order operators while a model is captured.

PyTorch captures the branches of ``torch.cond``, ``while_loop``, ``scan`` and ``map`` with Dynamo, which cannot trace
through the modes that record what a trace would lose: they step aside meanwhile, and are back when the captured
branches run. Where a branch disables gradients, its values are stopped. What PyTorch does for reverse mode through them
is left out, as for every other operator: its autograd Functions would be taken for the model's own. ``flex_attention``
runs by its mathematics.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._C import DispatchKey, _AutoDispatchBelowAutograd, _len_torch_function_stack
from torch._higher_order_ops import utils
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from fomoh_fx.errors import CaptureError
from fomoh_fx.passes.dataflow import graphs_in
from fomoh_fx.rules.flex_attention import dense_attention

_IN_PLACE = re.compile(r"setitem|i(add|sub|mul|truediv|floordiv|pow|mod|and|or|xor|lshift|rshift)|.*[^_]_")
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
    for (module, name), value in replaced.items():
        setattr(module, name, value)
    try:
        with _without_autograd():
            yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


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
    from torch._dynamo.variables import AutogradFunctionVariable  # slow to import, and rarely needed

    with _aside() as modes, _SETUP() as backend, patch.object(AutogradFunctionVariable, "call_apply", _apply):

        def under_modes(module: Any, inputs: Any, **options: Any) -> Callable[..., Any]:
            _stop_where_disabled(module)
            run = backend(module, inputs, **options)

            def function(*args: Any) -> Any:
                with _pushed(modes):
                    return run(*args)

            return function

        yield under_modes


def _apply(variable: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """A custom autograd Function is called when the branch runs: Dynamo would trace its forward alone."""
    from torch._dynamo.variables import TorchInGraphFunctionVariable

    call = torch.compiler.allow_in_graph(lambda *values, **others: variable.fn_cls.apply(*values, **others))
    return TorchInGraphFunctionVariable(call).call_function(tx, args, kwargs)


def _stop_where_disabled(module: fx.GraphModule) -> None:
    """Say in the bodies what their trace would lose: no derivative passes through what is computed under no_grad."""
    for body in graphs_in(module)[1:]:  # what is around them runs under the modes
        enabled, stopped = True, set[fx.Node]()
        for node in list(body.graph.nodes):
            if node.target is torch._C._set_grad_enabled:
                enabled = bool(node.args[0])
            elif node.op not in ("call_function", "call_method", "call_module"):
                continue
            elif not enabled or (node.target is operator.getitem and node.args[0] in stopped):
                if _IN_PLACE.fullmatch(getattr(node.target, "__name__", str(node.target))):
                    raise CaptureError(
                        f"model: {node.target} in the body of a branch or loop changes a tensor in place under "
                        "no_grad; compute a new one instead"
                    )
                stopped.add(node)
                _stop(node)
        body.recompile()


def _stop(node: fx.Node) -> None:
    value = node.meta.get("example_value")
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        with node.graph.inserting_after(node):
            stop = node.graph.call_function(torch.ops.fomoh_fx.stop_gradient.default, (node,))
        stop.meta = dict(node.meta)
        node.replace_all_uses_with(stop, delete_user_cb=lambda user: user is not stop)


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
