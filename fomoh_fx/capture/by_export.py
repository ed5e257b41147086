"""By torch.export, which records a module as a graph of ATen operators with its parameters and buffers as inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._functorch import predispatch
from torch._inductor import config as inductor_config
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from fomoh_fx.capture.dimensions import marks_kept
from fomoh_fx.capture.inputs import distinct, state_of
from fomoh_fx.capture.known import erase_answered
from fomoh_fx.capture.program import Input, Output, Program
from fomoh_fx.capture.root import Root
from fomoh_fx.capture.tracing import views_in_any_layout
from fomoh_fx.decompositions import decomposed
from fomoh_fx.errors import CaptureError
from fomoh_fx.rules.registry import COMPOSITES, RULES

aten = torch.ops.aten


def from_export(root: Root, names: Sequence[str], dynamic_shapes: Any) -> Program:
    tensors = distinct(root)
    shapes = None if dynamic_shapes is None else {"tensors": tuple(dynamic_shapes)}
    # With symbols the cache's keys take longer than what it saves; the fake mode keeps the choice.
    cached = dynamo_config.patch(fake_tensor_cache_enabled=shapes is None)
    with marks_kept(tensors), cached:
        exported = torch.export.export(root, tensors, strict=False, dynamic_shapes=shapes)
    for node in exported.graph_module.graph.find_nodes(op="placeholder"):
        node.meta.pop("custom", None)  # where Dynamo captured a branch, it names itself, and then refuses another name
    _refuse_transforms(exported)
    keeps_draws = inductor_config.patch(fallback_random=True)  # unused ones, too, as the model draws them
    with views_in_any_layout(), keeps_draws:
        exported = decomposed(exported, whole=[*RULES, *COMPOSITES, aten.detach.default])
    erase_answered(exported.graph)
    arguments = iter(range(len(tensors)))
    inputs = []
    for spec in exported.graph_signature.input_specs:
        target = spec.target or ""
        if spec.kind == InputKind.USER_INPUT:
            index = next(arguments)
            inputs.append(Input("argument", names[index], index))
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            inputs.append(state_of(root, target))
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            inputs.append(Input("constant", target, tensor=exported.constants[target]))
        elif spec.kind == InputKind.TOKEN:  # make_fx knows none
            raise NotImplementedError("an operator with an effect, such as a check of values under vmap")
        else:
            raise CaptureError(f"model: an input of kind {spec.kind.name} ({target}) is not supported")
    outputs = []
    for spec in exported.graph_signature.output_specs:
        if spec.kind == OutputKind.USER_OUTPUT:
            outputs.append(Output("value"))
        elif spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            outputs.append(Output("change", state_of(root, spec.target or "")))
        elif spec.kind == OutputKind.USER_INPUT_MUTATION:
            listed = [s.arg.name for s in exported.graph_signature.input_specs]
            outputs.append(Output("change", inputs[listed.index(spec.target or "")]))
        else:
            raise CaptureError(f"model: an output of kind {spec.kind.name} ({spec.target}) is not supported")
    structure = root.observed.structure
    assert structure is not None
    return Program(exported.graph_module, inputs, outputs, structure, "torch.export")


def _refuse_transforms(exported: ExportedProgram) -> None:
    """Function transforms that PyTorch's decompositions lose or crash the process on; make_fx traces through them.

    These are forward mode inside the model, whose outer levels may vanish, and what a transform that is over
    (``torch.func.grad``) has left as a constant.
    """
    if exported.graph.find_nodes(op="call_function", target=predispatch._make_dual):
        raise NotImplementedError("torch.export does not keep forward mode inside a model")
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if any(isinstance(constant, Tensor) and is_wrapped(constant) for constant in exported.constants.values()):
        raise NotImplementedError("torch.export makes the argument of a function transform a constant")
