"""Eliminate: drop every node whose value nobody uses.

Contract: a functional graph in, the same graph without dead nodes out; inputs, outputs and assertions on data stay as
they are. So do random operators: without an unused draw the next one would give other numbers than in the model.
Higher-order operators are pruned, the last first, for what one no longer takes an earlier one need not return.
"""

from __future__ import annotations

from torch import fx

from fomoh_fx.passes.dataflow import bodies_of, is_effect
from fomoh_fx.passes.prune import prune_operands, prune_outputs


def eliminate(module: fx.GraphModule) -> fx.GraphModule:
    """Remove dead nodes and the attributes that only they used."""
    module.graph.eliminate_dead_code(is_impure_node=is_effect)
    for node in reversed([n for n in module.graph.nodes if bodies_of(n)]):
        prune_outputs(node)
        for body in bodies_of(node):
            eliminate(body)
        prune_operands(node)
        module.graph.eliminate_dead_code(is_impure_node=is_effect)
    used = {str(node.target).split(".")[0] for node in module.graph.find_nodes(op="get_attr")}
    attributes = [*module.named_children(), *module.named_buffers(recurse=False)]
    for name in [name for name, _ in attributes if name not in used]:
        delattr(module, name)
    module.recompile()
    return module
