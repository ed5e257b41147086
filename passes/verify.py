"""Verify: the graph between two passes is a well-formed functional program.

Contract: reads the graph, changes nothing, raises :class:`VerificationError` naming the node.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fomoh_fx.errors import VerificationError
from fomoh_fx.passes import provenance


def verify(module: fx.GraphModule, stage: str) -> None:
    """Check names, order of definition and use, provenance, recorded values, and that nothing is mutated."""
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"stage {stage}: {error}") from error
    for node in module.graph.nodes:
        if node.op == "call_function":
            _check_call(node, stage)


def _check_call(node: fx.Node, stage: str) -> None:
    if provenance.KEY not in node.meta:
        raise VerificationError(f"stage {stage}: node {node.name} has lost its provenance")
    if "val" not in node.meta and node.users:
        raise VerificationError(f"stage {stage}: node {node.name} has no recorded value")
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable:
            raise VerificationError(f"stage {stage}: node {node.name} mutates an argument ({target})")
        if target in _ZERO_TENSORS:
            raise VerificationError(f"stage {stage}: node {node.name} is a zero without storage ({target})")
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.layout != torch.strided:
        raise VerificationError(f"stage {stage}: node {node.name} is sparse")


_ZERO_TENSORS = {torch.ops.aten._efficientzerotensor.default}
