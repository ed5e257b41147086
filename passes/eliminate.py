"""Eliminate: drop every node whose value nobody uses.

Contract: a functional graph in, the same graph without dead nodes out; inputs, outputs and assertions on data stay as
they are. Random operators are dropped too: an unused draw changes no result.
"""

from __future__ import annotations

from torch import fx
from torch._ops import OpOverload


def eliminate(module: fx.GraphModule) -> fx.GraphModule:
    """Remove dead nodes and the attributes that only they used."""
    module.graph.eliminate_dead_code(is_impure_node=is_effect)
    used = {str(node.target).split(".")[0] for node in module.graph.find_nodes(op="get_attr")}
    for name, child in list(module.named_children()):
        if name not in used:
            delattr(module, name)
        elif isinstance(child, fx.GraphModule):  # the body of a higher-order operator
            eliminate(child)
    for name in [n for n, _ in module.named_buffers(recurse=False) if n not in used]:
        delattr(module, name)
    module.recompile()
    return module


def is_effect(node: fx.Node) -> bool:
    """Whether the node is not there for its value: an input, the output, an operator that returns nothing (asserts)."""
    if node.op == "call_function":
        return isinstance(node.target, OpOverload) and not node.target._schema.returns
    return node.op in ("placeholder", "output")
