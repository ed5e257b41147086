"""By make_fx on fake tensors, for what torch.export refuses: it runs the model once and records its operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from fomoh_fx.capture.inputs import distinct, state_of
from fomoh_fx.capture.known import erase_answered
from fomoh_fx.capture.program import Input, Output, Program
from fomoh_fx.capture.root import Root
from fomoh_fx.capture.state import replaced
from fomoh_fx.capture.tracing import views_in_any_layout

aten = torch.ops.aten


def from_make_fx(root: Root, names: Sequence[str], dynamic_shapes: Any, is_exporting: bool = True) -> Program:
    owned = {**dict(root.named_parameters()), **dict(root.named_buffers())}
    tensors = distinct(root)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [fake_mode.from_tensor(t, static_shapes=True) for t in (*owned.values(), *tensors)]

    def functional(*flat: Tensor) -> list[Tensor]:
        others = dict(zip(map(id, owned.values()), flat, strict=False))
        with replaced(root, others):
            return root(*flat[len(owned) :])

    record = partial(make_fx, tracing_mode="real", _allow_non_fake_inputs=True, record_stack_traces=True)
    table = {aten.native_batch_norm.default: _batch_norm}
    as_under_export = _compiling_state_context() if is_exporting else nullcontext()  # for is_compiling()
    with fake_mode, sdpa_kernel(SDPBackend.MATH), as_under_export, _checks_recorded():
        module = record(functional, table)(*fakes)
        for node in module.graph.find_nodes(op="call_function", target=aten.detach.default):
            node.replace_all_uses_with(node.args[0])  # how autograd saves a value; the model's own are stop_gradient
        erase_answered(module.graph)
        # functionalized after recording: a model that calls torch.autograd.grad cannot run inside functionalize
        with views_in_any_layout(), torch.no_grad():  # where leaves may change in place
            module = record(torch.func.functionalize(fx.Interpreter(module).run, remove="mutations"))(*fakes)
    inputs = [state_of(root, name) for name in owned]
    inputs += [Input("argument", name, i) for i, name in enumerate(names)]
    assert root.observed.structure is not None
    outputs = _mutations_as_outputs(module, inputs)
    return Program(module, inputs, outputs, root.observed.structure, "make_fx")


@contextmanager
def _checks_recorded() -> Iterator[None]:
    """``torch._check_tensor_all`` becomes an assertion in the graph; export records it itself."""

    def check(error: type[Exception], condition: Tensor, message: Callable[[], str] | None = None) -> None:
        torch._assert_async(condition.all(), "a check of the model failed" if message is None else str(message()))

    before = torch._check_tensor_all_with
    torch._check_tensor_all_with = check
    try:
        yield
    finally:
        torch._check_tensor_all_with = before


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float
) -> Any:
    """The operator that says that it changes the running statistics: native_batch_norm does so silently."""
    if mean is None:
        return aten._native_batch_norm_legit.no_stats(x, weight, bias, training, momentum, eps)
    if not training:
        return aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, variance, momentum, eps)
    return aten._native_batch_norm_legit.default(x, weight, bias, mean, variance, training, momentum, eps)


def _mutations_as_outputs(module: fx.GraphModule, inputs: list[Input]) -> list[Output]:
    """Turn the final copies into inputs that functionalization leaves into outputs."""
    placeholders = module.graph.find_nodes(op="placeholder")
    (results,) = module.graph.output_node().args
    new: list[Any] = []
    outputs: list[Output] = []
    for node in module.graph.find_nodes(op="call_function", target=aten.copy_.default):
        what = inputs[placeholders.index(node.args[0])]
        new.append(node.args[1])
        outputs.append(Output("change", what))
        module.graph.erase_node(node)
    values = list(results) if isinstance(results, (list, tuple)) else [results]
    module.graph.output_node().args = ((*new, *values),)
    module.recompile()
    return outputs + [Output("value")] * len(values)
