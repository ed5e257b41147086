"""Transformed functions that are called inside a model that is captured, or under ``torch.func.vmap``.

Each is captured on its own, as if nothing were around it, and its operations become a part of what there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._C._functorch import TransformType, is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters, temporarily_clear_interpreter_stack
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fomoh_fx.capture.modules import calls_unnoticed
from fomoh_fx.capture.threads import is_capturing
from fomoh_fx.errors import ArgumentError
from fomoh_fx.literals import is_small, literal


def is_a_part() -> bool:
    """Whether this runs inside a model that is captured, or inside a transform of ``torch.func``."""
    return is_capturing() or torch._C._functorch.get_dynamic_layer_stack_depth() > 0


class Part(fx.Interpreter):
    """Runs a graph as a part of a model that is captured.

    Its small constants are written out: of a function that the model transforms at every call they are new tensors each
    time.
    """

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        if type(value) is not Tensor or not is_capturing():
            return value
        with torch._C.DisableTorchFunction():  # the model does not use it
            is_written_out = is_small(value)
        return literal(value) if is_written_out else value


def refuse_differentiated(tree: Any) -> None:
    """Results are values, of which ``torch.func``'s derivatives would be zero.

    Raises:
        ArgumentError: inside one of these.
    """
    kinds = {interpreter.key() for interpreter in retrieve_all_functorch_interpreters()}
    wrapped = [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor) and is_functorch_wrapped_tensor(x)]
    if wrapped and kinds - {TransformType.Vmap} and not is_capturing():
        raise ArgumentError(
            "args: a transformed function is called inside torch.func.grad, jvp or the like, which do not see its "
            "derivative: its results are values. Transform the outer function by fomoh_fx, too (fomoh_fx.grad, "
            "fomoh_fx.transform), or use torch.func's transforms inside"
        )


@contextmanager
def outside_of_capture() -> Iterator[None]:
    """As if no frontend were running a model: none of its modes, none of its flags, nobody who notices calls."""
    with ExitStack() as stack:
        for _ in _get_current_function_mode_stack():
            stack.enter_context(_pop_mode_temporarily())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(calls_unnoticed())
        for flag in ("_is_compiling_flag", "_is_exporting_flag"):
            stack.enter_context(patch.object(torch.compiler, flag, False))
        yield


def examples(tree: Any) -> Any:
    """Tensors of zeros in the places of those that stand for tensors while a model is captured, of the same kinds."""
    kinds = pytree.tree_map_only(Tensor, lambda x: (x.shape, x.stride(), x.dtype, x.device, x.requires_grad), tree)
    with outside_of_capture():
        return pytree.tree_map(_zeros, kinds, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 5 and _is_kind(x))


def _is_kind(x: tuple[Any, ...]) -> bool:
    return isinstance(x[0], torch.Size) and isinstance(x[2], torch.dtype)


def _zeros(kind: Any) -> Any:
    if not (isinstance(kind, tuple) and len(kind) == 5 and _is_kind(kind)):
        return kind
    size, stride, dtype, device, learns = kind
    return torch.empty_strided(size, stride, dtype=dtype, device=device).zero_().requires_grad_(learns)
