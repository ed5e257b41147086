"""Values that were known at capture and give a size: the counts of ``repeat_interleave``, a mask, what is nonzero.

A frontend knows the tensors that a model writes out, and what is computed from them. What records the graph anew does
not, so these are computed here, and are constants of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fomoh_fx.capture.program import Program
from fomoh_fx.passes.activity import ancestors
from fomoh_fx.passes.data_sizes import has_sizes_from_data
from fomoh_fx.passes.dataflow import is_effectful_call

aten = torch.ops.aten


def fold_known(program: Program, foreign: Sequence[Tensor]) -> None:
    """Compute what gives a size that was known at capture, from what the model writes out.

    Args:
        program: changed in place.
        foreign: tensors that the model does not own, whose values may change.
    """
    sized = [node for node in program.module.graph.nodes if _gives_size(node) and not has_sizes_from_data(node)]
    known = {
        node: what.tensor
        for node, what in zip(program.placeholders, program.inputs, strict=True)
        if what.tensor is not None and not any(what.tensor is tensor for tensor in foreign)
    }
    for node in sized:
        if node.target is aten.index.Tensor:
            indices = [index for given in node.args[1] for index in _without_mask(given, known)]  # type: ignore
            node.args = (node.args[0], indices)
        elif (value := _value(node, known)) is not None:
            for part, known_value in _parts(node, value):
                part.replace_all_uses_with(_constant(part, known_value))
                part.graph.erase_node(part)
            if not isinstance(value, Tensor):
                node.graph.erase_node(node)
    program.module.recompile()


def erase_answered(graph: fx.Graph) -> None:
    """Erase questions about values that nothing in the graph needs: the answer was known, and the graph is for it."""
    for target in (aten._local_scalar_dense.default, aten.equal.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if not node.users:
                graph.erase_node(node)


def _gives_size(node: fx.Node) -> bool:
    has_tag = isinstance(node.target, OpOverload) and torch.Tag.dynamic_output_shape in node.target.tags
    values = pytree.tree_leaves(node.meta.get("val"))
    return has_tag and all(isinstance(value, Tensor) for value in values)


def _parts(node: fx.Node, value: Any) -> list[tuple[fx.Node, Tensor]]:
    """The node with its value, or those that take one of several."""
    if isinstance(value, Tensor):
        return [(node, value)]
    return [(user, value[user.args[1]]) for user in node.users]


def _without_mask(index: fx.Node | None, known: Mapping[fx.Node, Tensor]) -> list[fx.Node | None]:
    """An index into one dimension as it is, a mask that is known as the indices where it is true."""
    if index is None or index.meta["val"].dtype != torch.bool or (mask := _value(index, known)) is None:
        return [index]
    return [_constant(index, where) for where in mask.nonzero(as_tuple=True)]


def _value(node: fx.Node, known: Mapping[fx.Node, Tensor]) -> Any:
    """The node's value, None where it depends on more than what is known."""
    values: dict[fx.Node, Any] = dict(known)
    module = node.graph.owning_module
    before = ancestors(node.graph, [node])
    if any((n.op == "placeholder" and n not in known) or is_effectful_call(n) for n in before):
        return None
    for n in node.graph.nodes:
        if n not in before or n in values:
            continue
        if n.op == "get_attr":
            values[n] = getattr(module, str(n.target))
        else:
            args, kwargs = fx.map_arg((n.args, n.kwargs), lambda other: values[other])
            values[n] = n.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]


def _constant(at: fx.Node, value: Tensor) -> fx.Node:
    """A node of the value, just before another one and from its line."""
    module = at.graph.owning_module
    assert module is not None
    names = (f"known_{i}" for i in range(len(at.graph.nodes) + 1))
    name = next(name for name in names if not hasattr(module, name))
    module.register_buffer(name, value)
    with at.graph.inserting_before(at):
        node = at.graph.get_attr(name)
    fake = at.meta["val"].fake_mode
    node.meta = {**at.meta, "val": fake.from_tensor(value, static_shapes=True)}
    return node
