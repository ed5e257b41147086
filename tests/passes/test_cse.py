"""Equal expressions are computed once, and nothing else is merged."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass

from fomoh_fx.passes import provenance
from fomoh_fx.passes.cse import merge_common_subexpressions
from tests.passes.waste import compiled

X = torch.randn(3)


def merged(function, *inputs):
    """The number of calls that CSE removes; the result must be the same."""
    module = make_fx(lambda *xs: (function(*xs),))(*inputs)
    before = len(calls(module))
    torch.manual_seed(0)
    expected = module(*inputs)[0]
    module = merge_common_subexpressions(module)
    torch.manual_seed(0)
    torch.testing.assert_close(module(*inputs)[0], expected, rtol=0, atol=0)
    return before - len(calls(module))


def calls(module):
    return [n for n in module.graph.nodes if n.op == "call_function"]


def test_repeated_chains_are_merged():
    assert merged(lambda x: (x + 1).sin() * (x + 1).sin(), X) == 2


def test_keyword_arguments_and_lists_count():
    assert merged(lambda x: x.sum([0], dtype=torch.float64) + x.sum([0], dtype=torch.float32), X) == 0
    assert merged(lambda x: torch.cat([x, x]) + torch.cat([x, x]), X) == 1


def test_random_operators_are_not():
    assert merged(lambda x: torch.rand_like(x) + torch.rand_like(x), X) == 0

    def dropped(x):
        return torch.ops.aten.native_dropout(x, 0.5, True)[0]

    assert merged(lambda x: dropped(x) + dropped(x), X) == 0


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0.0, -0.0)])
def test_literals_of_another_type_are_not(one, other):
    assert merged(lambda x: (x + one).double().reciprocal() + (x + other).double().reciprocal(), torch.arange(3)) == 0


def test_repeated_constants_are_merged():
    constant = torch.arange(3)
    assert merged(lambda x: x.index_select(0, constant) + x.index_select(0, constant), X) == 1


def test_two_returned_values_stay_two():
    module = merge_common_subexpressions(make_fx(lambda x: (x.sin(), x.sin(), x.sin() + 1))(X))
    assert len(calls(module)) == 3  # the third sine is merged with the first


def test_the_earlier_node_stays_with_its_provenance():
    stages = compiled("mlp")[1].stages
    before = {n.name: provenance.of(n) for n in stages["simplify"].graph.nodes}
    for node in stages["cse"].graph.nodes:
        assert provenance.of(node) == before[node.name]
    assert len(calls(stages["cse"])) < len(calls(stages["simplify"]))


def test_why_not_pytorchs_own_pass():
    """Its CSEPass gives x + 1.0 the dtype of x + 1. When this fails, look at it again."""
    module = make_fx(lambda x: [x + 1, x + 1.0])(torch.arange(3))
    a, b = CSEPass()(module).graph_module(torch.arange(3))
    assert a.dtype == b.dtype == torch.int64
