"""What the inputs of a graph are: the arguments as frontends take them, and the state that each input stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, fx, nn

from fomoh_fx.capture.constants import argument
from fomoh_fx.capture.program import Input, Program
from fomoh_fx.capture.root import Root
from fomoh_fx.capture.state import Keys, place_of, places


def distinct(root: Root) -> tuple[Tensor, ...]:
    """The arguments, each a tensor of its own: frontends identify inputs by tensor, and the next call may differ.

    A tensor that is passed twice, or that is a parameter too, is replaced by an empty one like it: only values differ.
    So is one that was made in inference mode, which autograd refuses to save.
    """
    seen = {id(t) for t in (*root.parameters(), *root.buffers())}
    arguments = []
    for tensor in root.call.tensors:
        if id(tensor) in seen or tensor.is_inference():
            size, stride = tensor.shape, tensor.stride()
            tensor = torch.empty_strided(size, stride, dtype=tensor.dtype, device=tensor.device)
        seen.add(id(tensor))
        arguments.append(tensor)
    for i in root.call.differentiated:  # not as leaves, which nobody may change in place
        arguments[i] = _requiring_gradient(arguments[i])
    return tuple(arguments)


def _requiring_gradient(x: Tensor) -> Tensor:
    """A copy that is no leaf, laid out alike: a model may read the strides, and the offset in the storage."""
    copied = x.detach().requires_grad_().clone()
    if (copied.stride() == x.stride() and x.storage_offset() == 0) or x.numel() == 0:
        return copied
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    storage = torch.zeros(x.storage_offset() + extent, dtype=x.dtype, device=x.device).requires_grad_().clone()
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def state_of(root: Root, target: str) -> Input:
    """The parameter or buffer that the root calls ``target``: the model's own name for ``model.name``."""
    if target.startswith("foreign_"):
        tensor = root.foreign[int(target.removeprefix("foreign_"))]
        for owner in root.modules():
            if owner is not root and (keys := place_of(owner, tensor)) is not None:
                return Input("constant", target, module=owner, attribute=keys[0], inside=keys[1:])
        return Input("constant", target, tensor=tensor)
    parent, _, attribute = target.rpartition(".")
    module = root.get_submodule(parent)
    is_parameter = attribute in module._parameters  # under functional_call also a plain tensor
    kind: Literal["parameter", "buffer"] = "parameter" if is_parameter else "buffer"
    return Input(kind, target.removeprefix("model."), module=module, attribute=attribute)


def constant_of(root: Root, name: str, names: Sequence[str]) -> Input:
    """What a constant stands for."""
    if not name.startswith(argument("")):
        return state_of(root, name)
    index = int(name.removeprefix(argument("")))
    return Input("argument", names[index], index)


def share_tied(program: Program) -> None:
    """One tensor under several names is one input, under its first name: export lists it under each of them."""
    first: dict[int, tuple[fx.Node, Input]] = {}
    kept: list[Input] = []
    tied: list[tuple[Input, Input]] = []
    for node, what in zip(program.placeholders, program.inputs, strict=True):
        if what.module is not None:
            same, there = first.setdefault(id(what.value(())), (node, what))
            if same is not node:
                node.replace_all_uses_with(same)
                program.module.graph.erase_node(node)
                tied.append((there, what))
                continue
        kept.append(what)
    program.inputs, program.tied = kept, tied


def name_inputs(program: Program) -> None:
    """Inputs get the names that the user knows: ``layer_0_weight``, ``x``."""
    for node, what in zip(program.placeholders, program.inputs, strict=True):
        node._rename(re.sub(r"\W", "_", what.name))
        node.target = node.name
    program.module.recompile()


def ties(program: Program, root: Root) -> list[list[tuple[nn.Module, Keys]]]:
    """The places of each tensor that is an input and has several: the graph reads one of them."""
    inputs = {id(what.value(())) for what in program.inputs if what.module is not None}
    found: dict[int, list[tuple[nn.Module, Keys]]] = {}
    for module in root.modules():
        for keys, tensor in places(module) if module is not root else ():
            if id(tensor) in inputs:
                found.setdefault(id(tensor), []).append((module, keys))
    return [several for several in found.values() if len(several) > 1]
