"""The pipeline: normalize, expand, simplify, sink, cse, factors, fuse, layouts, eliminate.

Verified after each; every stage is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule, _make_graph_module, _use_lazy_graph_module

from fomoh_fx.hyperdual import Components
from fomoh_fx.passes.activity import analyse, ancestors
from fomoh_fx.passes.cse import merge_common_subexpressions
from fomoh_fx.passes.eliminate import eliminate
from fomoh_fx.passes.expand import Form, Layout, Scope, expand
from fomoh_fx.passes.factors import apart
from fomoh_fx.passes.fuse import fuse
from fomoh_fx.passes.layouts import refuse_sparse, settle
from fomoh_fx.passes.normalize import inputs_of, normalize, results_of
from fomoh_fx.passes.simplify import simplify
from fomoh_fx.passes.sink import sink
from fomoh_fx.passes.verify import verify

#: After the expansion: each takes a graph of its own and returns it rewritten.
REWRITES: dict[str, Callable[[fx.GraphModule], fx.GraphModule]] = {
    "simplify": simplify,
    "sink": sink,
    "cse": merge_common_subexpressions,
    "factors": apart,
    "fuse": fuse,
    "layouts": settle,
    "eliminate": eliminate,
}


@dataclass(frozen=True)
class Request:
    """What is asked of a captured graph.

    Attributes:
        seeds: positions of the inputs that have a tangent.
        asked: positions of the outputs whose components are asked for.
        components: which components.
        first_order_above: positions of the outputs at which the model ends: nodes that they depend on carry tangents
            only (the generalised Gauss-Newton plane). Empty for the Hessian.
        forms: in which the seeds' tangents are given (:data:`~fomoh_fx.passes.expand.Form`); by default all whole.
        first_order: whether tangents are among what is asked for.
    """

    seeds: Sequence[int]
    asked: Sequence[int]
    components: Components
    first_order_above: Sequence[int] = ()
    forms: Sequence[Form] | None = None
    first_order: bool = True


@dataclass(frozen=True)
class Compiled:
    """Every stage of the graph, the last of them final, and where its outputs have components."""

    stages: dict[str, fx.GraphModule]
    layout: Layout

    @property
    def final(self) -> fx.GraphModule:
        return list(self.stages.values())[-1]


@_use_lazy_graph_module(True)  # a stage between becomes Python code when somebody runs or reads it
def run(captured: fx.GraphModule, request: Request) -> Compiled:
    """Compile a captured graph into its hyper-dual expansion."""
    stages = {"capture": captured}
    refuse_sparse(captured)
    seeds, asked = _seeds_and_asked(captured, request)
    stages["normalize"] = normalize(captured, analyse(captured.graph, seeds, asked).active)
    verify(stages["normalize"], "normalize")
    stages["normalize"] = eliminate(stages["normalize"])
    seeds, asked = _seeds_and_asked(stages["normalize"], request)
    results = results_of(stages["normalize"])
    model_part = ancestors(stages["normalize"].graph, [results[i] for i in request.first_order_above])
    scope = Scope(analyse(stages["normalize"].graph, seeds, asked).active, model_part)
    given = dict(zip(seeds, request.forms or [None] * len(seeds), strict=True))
    stages["expand"], layout = expand(
        stages["normalize"], given, request.asked, request.components, scope, request.first_order
    )
    verify(stages["expand"], "expand")
    module = stages["expand"]
    for name, rewrite in REWRITES.items():
        module = rewrite(copy_of(module))
        verify(module, name)
        stages[name] = module
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            _LazyGraphModule.force_recompile(part)  # Dynamo reads no module that is still lazy
    return Compiled(stages, layout)


def _seeds_and_asked(module: fx.GraphModule, request: Request) -> tuple[list[fx.Node], list[fx.Node]]:
    inputs, results = inputs_of(module), results_of(module)
    return [inputs[i] for i in request.seeds], [results[i] for i in request.asked]


def copy_of(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with nodes and bodies of its own, for a pass to rewrite."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copied = _make_graph_module(module, graph)
    for name, child in list(copied.named_children()):
        if isinstance(child, fx.GraphModule):  # the body of a higher-order operator
            setattr(copied, name, copy_of(child))
    return copied
