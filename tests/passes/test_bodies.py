"""What the passes do to a graph they do to the bodies of its higher-order operators as well."""

import pytest
import torch
from torch import nn
from torch._higher_order_ops import scan
from torch._higher_order_ops.map import map as higher_order_map
from torch._higher_order_ops.while_loop import while_loop

import fomoh_fx
from fomoh_fx.errors import VerificationError
from fomoh_fx.passes import provenance
from fomoh_fx.passes.dataflow import bodies_of, graphs_in
from fomoh_fx.passes.verify import check_values, verify
from tests.passes.waste import no_waste
from tests.rules.test_control_flow import CASES, r

higher_order = torch.ops.higher_order
NAMES = ["cond", "while_loop", "scan", "cond in scan", "map"]
STAGES = ["normalize", "expand", "simplify", "cse", "eliminate"]


def traced(function, *inputs, active=None, second_order="plane"):
    hd = fomoh_fx.transform(function, wrt="inputs", second_order=second_order)
    active = range(len(inputs)) if active is None else active
    seeds = tuple(torch.randn(2, *x.shape, dtype=x.dtype) if i in active else None for i, x in enumerate(inputs))
    hd.trace(*inputs, tangents=seeds)
    return hd


def case(name, **options):
    return traced(CASES[name][0], r(5, 3), r(3, 3), **options)


def final(hd):
    return list(hd.stages.values())[-1]


def bodies(module):
    return [part for part in graphs_in(module) if part is not module]


def operators(module):
    return [str(n.target).removeprefix("aten.") for n in module.graph.nodes if n.op == "call_function"]


def the(module, op):
    (node,) = module.graph.find_nodes(op="call_function", target=op)
    return node


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_every_node_of_a_body_has_a_primal_a_component_and_a_line(name, stage):
    hd = case(name)
    primals = {n.name for part in graphs_in(hd.stages["normalize"]) for n in part.graph.nodes}
    assert bodies(hd.stages[stage])
    for body in bodies(hd.stages[stage]):
        for node in body.graph.nodes:
            if node.op == "output":
                continue
            origin = node.meta[provenance.KEY] if node.op != "get_attr" else provenance.of(node)
            assert origin.component in provenance.COMPONENTS
            assert origin.primal in primals or node.op == "get_attr", node.name
            assert node.op != "call_function" or origin.source.startswith("test_control_flow.py:"), node.name


def test_components_in_a_body_have_the_names_of_their_primals():
    body = bodies_of(the(final(case("while_loop")), higher_order.while_loop))[1]
    found = {n.name: str(provenance.of(n)) for n in body.graph.nodes}
    assert found["tanh"] == "primal"
    assert found["tanh_tangent"] == "tangent of tanh"
    assert found["tanh_cross"] == "cross of tanh"
    inputs = [str(provenance.of(n)) for n in body.graph.find_nodes(op="placeholder")]
    assert inputs == [
        "primal", "primal", "tangent of arg1_1", "cross of arg1_1", "primal", "tangent of arg2_1",
    ]  # fmt: skip


def test_bodies_of_inactive_operators_have_provenance():
    hd = traced(
        lambda x, w: torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,)) * w, r(3), r(3), active=[1]
    )
    assert [operators(b) for b in bodies(final(hd))] == [["sin.default"], ["cos.default"]]
    for body in bodies(final(hd)):
        assert all(provenance.of(n).source for n in body.graph.nodes if n.op == "call_function")
        assert all(provenance.KEY in n.meta for n in body.graph.nodes if n.op != "output")


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace", None])
@pytest.mark.parametrize("name", NAMES)
def test_bodies_are_simplified(name, second_order):
    for body in bodies(final(case(name, second_order=second_order))):
        for node in body.graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default):
            assert node.meta["val"].shape != node.args[0].meta["val"].shape
        for node in body.graph.nodes:
            assert node.users or node.op in ("placeholder", "output"), node.name


def test_repeated_computations_in_bodies_are_merged():
    body = bodies_of(the(final(case("while_loop")), higher_order.while_loop))[1]
    constants = [n.target for n in body.graph.find_nodes(op="get_attr")]
    assert len(set(constants)) == len(constants)
    body = bodies_of(the(final(case("cond")), higher_order.cond))[1]
    assert operators(body).count("sin.default") == 1


def test_what_is_returned_stays_memory_of_its_own():
    def function(x):
        def positive(x):
            return x * 1, x * 1 + 0, x.sin(), x.sin()

        return torch.cond(x.sum() > 0, positive, lambda x: (x + 0, x * 1, x / 1, x - 0), (x,))

    x = r(3)
    hd = traced(function, x)
    for sign in (1, -1):
        out = hd(sign * x, tangents=(r(2, 3),)).primal
        assert all(torch.equal(a, b) for a, b in zip(out, function(sign * x), strict=True))
        assert len({t.data_ptr() for t in out}) == 4
    for body in bodies(final(hd)):
        results = body.graph.output_node().args[0]
        assert len(set(results)) == len(results) == 4 + 4 + 2  # the sines' crosses


def test_draws_in_bodies_are_not_merged():
    def function(x):
        def dropped(x):
            return nn.functional.dropout(x, 0.5) + nn.functional.dropout(x, 0.5)

        return torch.cond(x.sum() > 0, dropped, lambda x: x.sin(), (x,))

    body = bodies_of(the(final(traced(function, r(4))), higher_order.cond))[0]
    assert sum("dropout" in name or "bernoulli" in name for name in operators(body)) == 2


# Outputs and operands that nobody uses.


def values(node):
    return [v for v in node.meta["val"] if v is not None]


def test_outputs_of_branches_that_nobody_uses_go():
    def function(x, w):
        y, z, _ = torch.cond(
            w.sum() > 0, lambda x, w: (x.sin(), x.cos(), w.exp()), lambda x, w: (x * 2, x.exp(), w + 1), (x, w)
        )
        return y.round() * 1.5 + z

    hd = traced(function, r(3), r(3), active=[0])
    node = the(final(hd), higher_order.cond)
    assert len(values(node)) == 1 + 1 + 2  # y, z and the components of z
    true, false = bodies_of(node)
    assert len(true.graph.output_node().args[0]) == len(false.graph.output_node().args[0]) == 4
    assert [n.name for n in node.args[3]] == ["x", "x_tangent"]
    assert len(true.graph.find_nodes(op="placeholder")) == 2
    assert "exp.default" not in operators(true)


def test_what_a_loop_carries_in_vain_goes():
    def function(x, w):
        def body(i, c, unused):
            return i + 1, torch.tanh(c @ w), torch.sin(unused * c)

        return while_loop(lambda i, c, unused: i < 3, body, (torch.tensor(0), x, x.cos()))[1]

    node = the(final(traced(function, r(5, 3), r(3, 3))), higher_order.while_loop)
    assert len(values(node)) == 1 + 3  # the counter stays: the condition reads it
    assert len(node.args[2]) == 4
    for body in bodies_of(node):
        assert len(body.graph.find_nodes(op="placeholder")) == 4 + 2
        assert "sin.default" not in operators(body)


def test_what_a_scan_carries_or_stacks_in_vain_goes():
    def function(x, w):
        def step(carry, row):
            c, unused = carry
            return (torch.tanh(c @ w + row), unused * row), (c * 2, unused + 1)

        (last, _), (rows, _) = scan(step, (torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)), x)
        return rows

    hd = traced(function, r(5, 3), r(3, 3))
    node = the(final(hd), higher_order.scan)
    assert len(node.args[1]) == 3
    assert len(values(node)) == 3 + 3
    assert list(node.args[1]) and len(bodies_of(node)[0].graph.output_node().args[0]) == 6


def test_what_a_map_computes_in_vain_goes():
    def function(x, w):
        return higher_order_map(lambda row, w: (torch.tanh(row @ w), row.exp()), x, w)[0]

    node = the(final(traced(function, r(5, 3), r(3, 3))), higher_order.map_impl)
    assert len(values(node)) == 3
    assert "exp.default" not in operators(bodies_of(node)[0])


def test_in_a_branch_within_a_scan():
    def function(x, w):
        def step(c, row):
            new, _ = torch.cond(
                row.sum() > 0, lambda c, row: (torch.sin(c @ w), row.exp()), lambda c, row: (c * row, c + 1), (c, row)
            )
            return new, new * 2

        return scan(step, torch.ones(3, dtype=x.dtype), x)[1]

    (step,) = bodies_of(the(final(traced(function, r(5, 3), r(3, 3))), higher_order.scan))
    node = the(step, higher_order.cond)
    assert len(values(node)) == 3
    assert not any("exp.default" in operators(b) for b in bodies_of(node))


# The verifier.


@pytest.fixture
def loop():
    module = final(case("while_loop"))
    return module, bodies_of(the(module, higher_order.while_loop))[1]


def test_a_body_without_provenance_is_noticed(loop):
    module, body = loop
    the(body, torch.ops.aten.tanh.default).meta.pop(provenance.KEY)
    with pytest.raises(VerificationError, match="node tanh .*has lost its provenance"):
        verify(module, "cse")


def test_a_mutation_in_a_body_is_noticed(loop):
    module, body = loop
    the(body, torch.ops.aten.tanh.default).target = torch.ops.aten.tanh_.default
    with pytest.raises(VerificationError, match="mutates an argument"):
        verify(module, "cse")


def test_another_number_of_operands_is_noticed(loop):
    module, body = loop
    node = the(module, higher_order.while_loop)
    node.args = (*node.args[:3], node.args[3][:1])
    with pytest.raises(VerificationError, match="node while_loop .*takes 6 values, but is given 5"):
        verify(module, "cse")


@pytest.mark.parametrize("name", NAMES)
def test_recorded_values_are_those_of_the_operators(name):
    for stage in STAGES:
        check_values(case(name).stages[stage])


def test_a_stale_value_in_a_body_is_noticed(loop):
    module, body = loop
    node = the(body, torch.ops.aten.tanh.default)
    node.meta["val"] = node.meta["val"].unsqueeze(0)
    with pytest.raises(VerificationError, match="node tanh .*computes"):
        check_values(module)


@pytest.mark.parametrize("name", NAMES)
def test_no_waste_in_bodies(name):
    for body in bodies(final(case(name))):
        no_waste(body, is_body=True)
