"""Varied, useful, active."""

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fomoh_fx
from fomoh_fx.passes import provenance
from fomoh_fx.passes.activity import analyse, ancestors
from tests.passes.waste import compiled


def graph(function, *inputs):
    return make_fx(function)(*inputs).graph


def names(nodes):
    return {n.name for n in nodes if n.op != "output"}


def test_varied_and_useful():
    g = graph(lambda x, w: (x.sin(), w.cos() * x.exp(), w.tanh()), torch.randn(3), torch.randn(3))
    x = g.find_nodes(op="placeholder")[0]
    results = g.output_node().args[0]
    activity = analyse(g, [x], [results[1]])
    assert names(activity.varied) >= {"sin", "exp", "mul"}
    assert "tanh" not in names(activity.varied) and "cos" not in names(activity.varied)
    assert "sin" not in names(activity.useful)
    assert names(activity.active) == {x.name, "exp", "mul"}


def test_integers_and_comparisons_carry_nothing():
    g = graph(lambda x: ((x > 0).float() * x, x.long().float()), torch.randn(3))
    x = g.find_nodes(op="placeholder")[0]
    activity = analyse(g, [x], g.output_node().args[0])
    assert "gt" not in names(activity.active) and "mul" in names(activity.active)
    assert names(activity.varied) == {x.name, "mul"}


def test_ancestors_include_the_nodes():
    g = graph(lambda x, w: (x.sin().cos(), w.exp()), torch.randn(3), torch.randn(3))
    cos = g.output_node().args[0][0]
    assert {"sin", "cos"} < names(ancestors(g, [cos]))
    assert "exp" not in names(ancestors(g, [cos]))


def components(specialization):
    return [provenance.of(n).component for n in specialization.compiled.final.graph.nodes if n.op == "call_function"]


def test_first_order_has_no_second_order_node():
    assert set(components(compiled("mlp", second_order=None)[1])) == {"primal", "tangent"}


def test_a_first_layer_has_no_cross_component():
    names = {n.name for n in compiled("mlp")[1].compiled.final.graph.nodes}
    assert {"linear_tangent", "tanh_cross"} < names
    assert not any(name.startswith("linear_cross") for name in names)


def test_what_is_not_seeded_has_no_component():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    hd = fomoh_fx.transform(model, wrt="2.*")
    hd.trace(torch.randn(4, 3), tangents={"2.weight": torch.randn(2, 2, 3)})
    primals = {provenance.of(n).primal for n in hd.stages["eliminate"].graph.nodes if n.op == "call_function"}
    active = {
        provenance.of(n).primal
        for n in hd.stages["eliminate"].graph.nodes
        if n.op == "call_function" and provenance.of(n).component != "primal"
    }
    assert {"linear", "tanh", "linear_1"} <= primals
    assert active == {"linear_1"}


def test_the_number_of_nodes_does_not_depend_on_the_number_of_directions():
    few, many = (len(compiled("mlp", directions=k)[1].compiled.final.graph.nodes) for k in (2, 8))
    assert few == many
