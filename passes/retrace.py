"""Running an interpreter over a graph and recording what it does as a new graph.

PyTorch's make_fx does the recording. Operators that PyTorch would decompose on the way down to the dispatcher (linear,
scaled_dot_product_attention, ..) are recorded whole here when an interpreter calls them: the graph stays small and a
rule sees the operator that it was written for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
    track_tensor_tree,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fomoh_fx.sizes import SYMBOLIC

#: Batching rules ask for sizes by an operator; recorded, it would return a list, which is no value of a graph.
_SIZES = {torch.ops.aten.size.default: lambda x: list(x.shape)}

#: What a higher-order operator's call has excluded when it traces a body.
_AUTOGRAD = [
    getattr(torch._C.DispatchKey, key)
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView")
]


def is_composite_implicit(op: Any) -> bool:
    """Whether PyTorch itself defines the operator by other operators."""
    if not isinstance(op, OpOverload) or op.namespace == "prim":  # those the dispatcher does not know
        return False
    return op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


class _RecordWhole(TorchFunctionMode):
    """Records calls of composite operators as one node each, on tensors that the trace knows."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mode = get_proxy_mode()
        if mode is None or not is_composite_implicit(func):
            return func(*args, **kwargs)
        tracer = mode.tracer
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
            return func(*args, **kwargs)
        if any(get_proxy_slot(t, tracer, None) is None for t in tensors):
            return func(*args, **kwargs)
        proxies = [_proxy(leaf, tracer) for leaf in leaves]
        proxy_args, proxy_kwargs = pytree.tree_unflatten(proxies, spec)
        with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
        proxy = tracer.create_proxy("call_function", func, proxy_args, proxy_kwargs, name=func._opname)
        track_tensor_tree(out, proxy, constant=None, tracer=tracer)
        return out


def in_body(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as the body of a higher-order operator, recorded like the graph around it.

    The operator's call puts modes aside, and autograd, without which a rule made from a backward would see zeros.
    """

    def body(*args: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(_RecordWhole())
            for key in _AUTOGRAD:
                stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
            return function(*args)

    return body


def _proxy(leaf: Any, tracer: Any) -> Any:
    if isinstance(leaf, Tensor):
        return get_proxy_slot(leaf, tracer, leaf, lambda slot: slot.proxy)
    if isinstance(leaf, SYMBOLIC):
        return get_proxy_slot(leaf, tracer).force()
    return leaf


def retrace(
    function: Callable[..., Any], inputs: list[Any], decompositions: Mapping[Any, Callable[..., Any]] | None = None
) -> fx.GraphModule:
    """The graph of ``function(*inputs)`` on fake tensors, under no_grad; a caller's autocast changes nothing."""
    fake_mode = detect_fake_mode(inputs)
    table = {**(decompositions or {}), **_SIZES}
    trace = make_fx(function, table, tracing_mode="real", _allow_non_fake_inputs=True)
    symbolic = any(isinstance(n, torch.SymInt) for x in inputs if isinstance(x, Tensor) for n in x.shape)
    dynamic = _keeping_sizes() if symbolic or _has_sizes_inside(fake_mode) else nullcontext()
    with fake_mode or nullcontext(), torch.no_grad(), without_autocast(), dynamic, _RecordWhole():
        return trace(*inputs)


def _has_sizes_inside(fake_mode: Any) -> bool:
    """Whether capture has met numbers that only the data decide, as the size of ``x[x > 0]``."""
    shapes = None if fake_mode is None else fake_mode.shape_env
    return shapes is not None and shapes.unbacked_symint_counter > 0


@contextmanager
def _keeping_sizes() -> Iterator[None]:
    """Without Python's own kernels, PyTorch's fix a dynamic dimension to its example; questions about a memory layout
    do not restrict it."""
    with enable_python_dispatcher(), symbolic_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """The casts of autocast are in the captured graph already."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def recorded_nodes(after: fx.Node | None = None) -> list[fx.Node]:
    """The nodes of the trace under way that came after the given one (all of them for None), in order.

    In the body of a higher-order operator these are the body's; none where PyTorch only asks for a body's shapes.
    """
    mode = get_proxy_mode()
    found: list[fx.Node] = []
    for node in reversed(mode.tracer.graph.nodes) if mode is not None else ():
        if node is after:
            break
        found.append(node)
    return found[::-1]


def last_node() -> fx.Node | None:
    """The newest node of the trace under way."""
    mode = get_proxy_mode()
    return next(iter(reversed(mode.tracer.graph.nodes)), None) if mode is not None else None


def node_of(value: Any) -> fx.Node | None:
    """The node of the trace under way that computed the value, or None for a constant."""
    mode = get_proxy_mode()
    if mode is None or not isinstance(value, Tensor):
        return None
    slot = get_proxy_slot(value, mode.tracer, None)
    return None if slot is None else slot.proxy.node
