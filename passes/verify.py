"""Verify: the graph between two passes is a well-formed functional program.

Contract: reads the graph and the bodies in it, changes nothing, raises :class:`VerificationError` naming the node.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fomoh_fx.errors import VerificationError
from fomoh_fx.passes import provenance
from fomoh_fx.passes.dataflow import bodies_of, graphs_in, is_assertion
from fomoh_fx.passes.prune import form_of, operands_of


def verify(module: fx.GraphModule, stage: str) -> None:
    """Check names, order of definition and use, the output, and every call."""
    for part in graphs_in(module):
        try:
            part.graph.lint()
        except RuntimeError as error:
            raise VerificationError(f"stage {stage}: {error}") from error
        by_name = {node.name: node for node in part.graph.nodes}
        for node in part.graph.nodes:
            problem = node.op == "call_function" and (
                _problem_of_call(node) or _problem_of_component(node, by_name) or _problem_of_bodies(node)
            )
            if problem:
                raise VerificationError(f"stage {stage}: node {node.name} {problem}")
    results = module.graph.output_node().args[0]
    if not isinstance(results, (tuple, list)) or not all(isinstance(result, fx.Node) for result in results):
        raise VerificationError(f"stage {stage}: the output is not one flat tuple of values, but {results}")


def _problem_of_call(node: fx.Node) -> str:
    """What is wrong with a call on its own: provenance, recorded value, mutation, kind of tensor."""
    if provenance.KEY not in node.meta:
        return "has lost its provenance"
    if "val" not in node.meta and not is_assertion(node) and not _is_left_out(node):
        return "has no recorded value"
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target._schema.is_mutable:
            return f"mutates an argument ({node.target})"
        if node.target is torch.ops.aten._efficientzerotensor.default:
            return f"is a zero without storage ({node.target})"
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.layout != torch.strided:
        return "is sparse"
    return ""


def _is_left_out(node: fx.Node) -> bool:
    """Whether it is an output that an operator was asked not to compute, of which nothing is recorded."""
    if node.target is not operator.getitem:
        return False
    outputs, number = node.args
    return outputs.meta["val"][number] is None  # type: ignore[union-attr,index]


def _problem_of_bodies(node: fx.Node) -> str:
    """A body that takes, or returns, another number of values than its operator gives, or returns."""
    form = form_of(node)
    if form is None:
        return ""
    for i, body in enumerate(bodies_of(node)):
        inputs, given = len(body.graph.find_nodes(op="placeholder")), len(operands_of(node, form))
        if inputs != given:
            return f"has a body that takes {inputs} values, but is given {given}"
        results: Any = body.graph.output_node().args[0]
        if not (form.asks and i == 0) and len(results) != len(node.meta["val"]):
            return f"returns {len(node.meta['val'])} values, but has a body that returns {len(results)}"
    return ""


def _problem_of_component(node: fx.Node, by_name: dict[str, fx.Node]) -> str:
    """A component that has not its primal's dtype; what a rule uses on the way to it may be wider."""
    origin = provenance.of(node)
    primal = by_name.get(origin.primal)
    if primal is None or node.name not in (f"{origin.primal}_tangent", f"{origin.primal}_cross"):
        return ""
    value, expected = node.meta["val"], primal.meta.get("val")
    if isinstance(value, Tensor) and isinstance(expected, Tensor) and value.dtype != expected.dtype:
        return f"is the {origin.component} of a {expected.dtype}, but has dtype {value.dtype}"
    return ""


def check_values(module: fx.GraphModule) -> None:
    """Compute every recorded value again from those of the arguments, and compare shapes and dtypes.

    Raises:
        VerificationError: a pass has changed a node and kept its old value.
    """
    for node in [node for part in graphs_in(module) for node in part.graph.nodes]:
        if not isinstance(node.target, torch._ops.OpOverload) or is_assertion(node):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        mode = detect_fake_mode((args, kwargs, node.meta["val"]))
        assert mode is not None  # recorded values are fake
        with mode:
            again = node.target(*args, **kwargs)
        computed, recorded = _kinds(again), _kinds(node.meta["val"])
        if computed != recorded:
            raise VerificationError(f"node {node.name} computes {computed}, but records {recorded}")


def _kinds(value: object) -> list[tuple[object, ...]]:
    return [(v.dtype, tuple(v.shape)) for v in pytree.tree_leaves(value) if isinstance(v, FakeTensor)]
