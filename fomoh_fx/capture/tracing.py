"""The state of the process while a frontend runs, and as it was before afterwards."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn
from torch._subclasses import fake_impls
from torch.autograd import forward_ad
from torch.export import _trace
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer

from fomoh_fx.capture.averages import cumulative_averages_recorded
from fomoh_fx.capture.constructors import constructors_recorded
from fomoh_fx.capture.root import Root
from fomoh_fx.capture.state import STANDARD
from fomoh_fx.containers import children
from fomoh_fx.literals import known_literals

aten = torch.ops.aten


@contextmanager
def tracing_state() -> Iterator[None]:
    """Capture does not depend on the caller's grad mode: what the model itself stops is recorded by the semantics."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(fx.traceback.preserve_node_meta())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch, about PyTorch's own calls
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # so is this
        stack.enter_context(quiet("torch._subclasses.fake_tensor"))
        stack.enter_context(quiet("torch.fx.experimental.symbolic_shapes"))
        stack.enter_context(patch.object(_trace, "print", lambda *_, **__: None, create=True))  # a graph
        stack.enter_context(patch.object(torch, "from_numpy", torch.as_tensor))  # which frontends see
        stack.enter_context(_transforms_left())
        stack.enter_context(known_literals())
        stack.enter_context(constructors_recorded())
        # Stand-ins for modules that have several names would tell by which one a model met them, and be no longer one.
        stack.enter_context(patch.object(_ModuleStackTracer, "getattr", fx.Tracer.getattr))
        stack.enter_context(cumulative_averages_recorded())
        stack.enter_context(_without_checks_of_values())
        yield


@contextmanager
def _transforms_left() -> Iterator[None]:
    """The function transforms in which a frontend failed are over: everything after it would run inside them."""
    depth, level = torch._C._functorch.get_dynamic_layer_stack_depth(), forward_ad._current_level
    try:
        yield
    finally:
        if level < 0:
            with suppress(RuntimeError):  # none was left
                torch._C._exit_dual_level(level=0)  # the only one that PyTorch can enter
            forward_ad._current_level = level
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """What a frontend logs about a refusal is part of our own error."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _without_checks_of_values() -> Iterator[None]:
    """PyTorch's own branches on data that do not change the result: validation of distributions, hints of causality."""
    transformer, distribution = nn.modules.transformer, torch.distributions.Distribution
    detect, validate = transformer._detect_is_causal_mask, distribution._validate_args
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)  # type: ignore[assignment]
    distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = detect
        distribution.set_default_validate_args(validate)


@contextmanager
def foreign_restored(root: Root) -> Iterator[None]:
    """Capture changes no state: what the model changes in place without owning it is as before."""
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in root.observed.before:
                tensor.copy_(before)


@contextmanager
def containers_kept(root: Root) -> Iterator[None]:
    """A tracer leaves copies of the containers in a module's attributes; others may refer to these."""
    before = [
        (module, name, value)
        for module in root.modules()
        for name, value in vars(module).items()
        if name not in STANDARD and children(value) is not None
    ]
    try:
        yield
    finally:
        for module, name, value in before:
            if name in vars(module) and vars(module)[name] is not value:
                vars(module)[name] = value


def views_in_any_layout() -> Any:
    """Let a view be a copy: what a change in place becomes may be laid out so that it has no view (reshape follows)."""
    table = fake_impls.op_implementations_dict
    return patch.dict(table, {aten.view.default: partial(table[aten.view.default], allow_copy=True)})
