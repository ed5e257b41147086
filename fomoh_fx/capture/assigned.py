"""What a model assigned to its attributes becomes the last outputs of its graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fomoh_fx import operators  # noqa: F401  defines stop_gradient
from fomoh_fx.capture.assignment import Same, remembered
from fomoh_fx.capture.inputs import constant_of
from fomoh_fx.capture.program import Input, Output, Program
from fomoh_fx.capture.refusals import refuse_remembered
from fomoh_fx.capture.root import Root
from fomoh_fx.capture.state import Keys, written
from fomoh_fx.containers import structure
from fomoh_fx.passes.activity import analyse, ancestors, carries_derivative
from fomoh_fx.passes.dataflow import is_effectful_call

DETACH = torch.ops.fomoh_fx.stop_gradient.default


def note_assignments(program: Program, root: Root, names: Sequence[str]) -> None:
    """The last outputs are what the model assigns. No value that an earlier call computed from a parameter is used,
    unless it is detached.
    """
    inputs = list(zip(program.placeholders, program.inputs, strict=True))
    parameters = {node: what.name for node, what in inputs if what.kind == "parameter" and carries_derivative(node)}
    used = [what for node, what in inputs if node.users]
    known = [what for node, what in inputs if any(user.target is not DETACH for user in node.users)]
    program.detached = [what for what in used if what not in known]
    i = len(program.outputs) - sum(made.count for made in root.observed.assigned)
    kept = []
    for made in root.observed.assigned:
        made.module = root.get_submodule(made.path or "")
        for leaf in made.leaves:
            if isinstance(leaf, Same):
                leaf.value = constant_of(root, leaf.name, names).value
        results = program.results[i : i + made.count]
        is_kept = made.module is not root.given
        made.computed_from = [_computed_from(result, program, parameters) if is_kept else None for result in results]
        source = next(filter(None, made.computed_from), None)
        if source and len(made.keys) > 1 and made.is_new and all(_is_of_parameters(r, program) for r in results):
            del program.outputs[i : i + made.count]  # a cache that stays empty: each call computes it anew
            left = program.results[:i] + program.results[i + made.count :]
            program.module.graph.output_node().args = (left,)
            continue
        if source and any(what.module is made.module and _overlap(what.keys, made.keys) for what in known):
            raise remembered(f"its attribute {made.name}", source)
        state = Input("buffer", made.name, module=made.module, attribute=made.keys[0], inside=made.keys[1:])
        program.outputs[i : i + made.count] = [Output("assignment", state)] * made.count
        i += made.count
        kept.append(made)
    for what in known:
        if what.kind not in ("argument", "parameter"):
            tensor = what.value(())
            place = f"a tensor of shape {tuple(tensor.shape)}" if what.module is None else written(what.keys)
            refuse_remembered(tensor, place if what.module is None else f"its attribute {place}", root)
    program.module.recompile()
    program.assignments, program.numbers = kept, root.observed.numbers
    of_modules = [made for made in root.observed.assigned if made.module is not root.given]
    deep = [(made.module, made.keys[0]) for made in of_modules if not made.is_tensor]
    deep += [(what.module, what.attribute) for what in used if what.inside]
    attributes = {(id(module), name): (module, name) for module, name in deep if module is not None}
    program.structures = [
        (module, name, structure(getattr(module, name, None))) for module, name in attributes.values()
    ]


def _is_of_parameters(result: fx.Node, program: Program) -> bool:
    """Whether a result depends only on parameters, and on what no call changes: it is a cache."""
    changed = {what.changes for what in program.outputs if what.kind == "change"}
    before = ancestors(program.module.graph, [result])
    inputs = [what for node, what in zip(program.placeholders, program.inputs, strict=True) if node in before]
    return not any(map(is_effectful_call, before)) and all(
        what.kind != "argument" and what not in changed for what in inputs
    )


def _computed_from(result: fx.Node, program: Program, parameters: dict[fx.Node, str]) -> str | None:
    """The first parameter in which a result has a derivative."""
    active = analyse(program.module.graph, parameters, [result]).active
    return next((name for node, name in parameters.items() if node in active), None)


def _overlap(one: Keys, other: Keys) -> bool:
    """Whether one place is in the other."""
    return all(a == b for a, b in zip(one, other, strict=False))
