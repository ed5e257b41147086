"""The verifier notices what a pass may break."""

import pytest
import torch

from fomoh_fx.errors import VerificationError
from fomoh_fx.passes import provenance
from fomoh_fx.passes.verify import check_values, verify
from tests.passes.waste import MODELS, compiled

aten = torch.ops.aten


@pytest.fixture
def module():
    return compiled("mlp")[1].compiled.final


def first(module, target):
    return module.graph.find_nodes(op="call_function", target=target)[0]


def test_a_compiled_graph_is_valid(module):
    verify(module, "eliminate")


def test_use_before_definition(module):
    node = first(module, aten.tanh.default)
    module.graph.output_node().append(node)
    with pytest.raises(VerificationError, match="stage cse: .*tanh"):
        verify(module, "cse")


def test_lost_provenance(module):
    first(module, aten.tanh.default).meta.pop(provenance.KEY)
    with pytest.raises(VerificationError, match="node tanh has lost its provenance"):
        verify(module, "cse")


def test_lost_value(module):
    first(module, aten.tanh.default).meta.pop("val")
    with pytest.raises(VerificationError, match="node tanh has no recorded value"):
        verify(module, "cse")


def test_mutation(module):
    first(module, aten.tanh.default).target = aten.tanh_.default
    with pytest.raises(VerificationError, match="node tanh mutates an argument"):
        verify(module, "cse")


def test_zero_tensor_without_storage(module):
    first(module, aten.tanh.default).target = aten._efficientzerotensor.default
    with pytest.raises(VerificationError, match="zero without storage"):
        verify(module, "cse")


def test_output_that_is_not_flat(module):
    output = module.graph.output_node()
    output.args = ((output.args[0],),)
    with pytest.raises(VerificationError, match="flat tuple"):
        verify(module, "cse")


def test_component_in_another_dtype(module):
    node = next(n for n in module.graph.nodes if n.name == "tanh_tangent")
    node.meta["val"] = node.meta["val"].to(torch.float64)
    with pytest.raises(VerificationError, match="node tanh_tangent is the tangent of a torch.float32, but has dtype"):
        verify(module, "cse")


@pytest.mark.parametrize("name", MODELS)
def test_recorded_values_are_those_of_the_operators(name):
    for stage in compiled(name)[1].stages.values():
        check_values(stage)


def test_a_stale_value_is_noticed(module):
    node = first(module, aten.tanh.default)
    node.meta["val"] = node.meta["val"].unsqueeze(0)
    with pytest.raises(VerificationError, match="node tanh computes"):
        check_values(module)
