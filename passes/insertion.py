"""Insertion: new nodes of a rewritten graph, with the value and the provenance that every node has."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._guards import detect_fake_mode


def insert_before(node: fx.Node, name: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call before a node, which serves what that node does."""
    with node.graph.inserting_before(node):
        made = node.graph.create_node("call_function", target, args, kwargs, name)
    values, options = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    mode = detect_fake_mode(values)
    assert mode is not None  # recorded values are fake
    with mode:
        made.meta = {**node.meta, "val": target(*values, **options)}
    return made
