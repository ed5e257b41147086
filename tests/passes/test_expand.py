"""The expansion as a graph: names, inputs, outputs, dtypes."""

import pytest
import torch

import fomoh_fx
from fomoh_fx.passes import provenance
from fomoh_fx.passes.expand import Layout
from tests.passes.waste import MODELS, compiled


def test_nodes_are_named_after_the_primal_and_the_component():
    stages = compiled("mlp")[1].stages
    names = {n.name for n in stages["expand"].graph.nodes}
    assert {"linear", "linear_tangent", "tanh", "tanh_tangent", "tanh_cross", "relu_cross"} < names
    for node in stages["normalize"].graph.nodes:
        assert node.op == "output" or node.name in names, "a primal has lost its name"
    for node in stages["expand"].graph.nodes:
        origin = provenance.of(node)
        if node.op == "call_function" and origin.component != "primal":
            assert node.name.startswith(f"{origin.primal}_{origin.component}")


def test_outputs_of_one_operator_keep_their_names():
    hd = fomoh_fx.transform(lambda x: torch.sort(x)[0] * 2, wrt="inputs")
    hd.trace(torch.randn(3), tangents=(torch.randn(2, 3),))
    taken_out = next(n for n in hd.stages["normalize"].graph.nodes if n.name.startswith("getitem"))
    expanded = {n.name: n for n in hd.stages["expand"].graph.nodes}
    assert f"{taken_out.name}_tangent" in expanded
    assert expanded["sort"].target is torch.ops.aten.sort.default


def test_inputs_are_the_primals_then_the_seeds():
    module = compiled("mlp", directions=3)[1].stages["expand"]
    inputs = module.graph.find_nodes(op="placeholder")
    names = [n.name for n in inputs]
    assert names[:7] == [n.name for n in compiled("mlp")[1].stages["normalize"].graph.find_nodes(op="placeholder")]
    assert names[7:] == [f"{name}_tangent" for name in names[:6]]
    assert inputs[7].meta["val"].shape == (3, *inputs[0].meta["val"].shape)


def test_layout():
    duals = Layout(3, (0, 2), (2,)).unpack(["a", "b", "c", "a'", "c'", "c''"])
    assert [(d.primal, d.tangent, d.cross) for d in duals] == [
        ("a", "a'", None),
        ("b", None, None),
        ("c", "c'", "c''"),
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stage", ["expand", "eliminate"])
def test_components_have_the_primals_dtype(name, stage):
    """Also in bfloat16: no float32 component where the primal has none."""
    torch.manual_seed(0)
    model, args = MODELS[name][0]().bfloat16(), [a.bfloat16() for a in MODELS[name][1]]
    hd = fomoh_fx.transform(model)
    hd.trace(*args, tangents={n: torch.randn(2, *p.shape).bfloat16() for n, p in model.named_parameters()})
    graph = hd.stages[stage].graph
    values = {n.name: n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    checked = 0
    for node in graph.nodes:
        origin = provenance.of(node)
        if node.name == f"{origin.primal}_{origin.component}" and origin.primal in values:
            assert values[node.name].dtype == values[origin.primal].dtype, node.name
            checked += 1
    assert checked
