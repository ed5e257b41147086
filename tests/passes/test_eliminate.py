"""Nothing that a final graph computes is in vain."""

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fomoh_fx
from fomoh_fx.passes.eliminate import eliminate
from tests.passes.waste import MODELS, compiled, no_waste


def test_dead_nodes_and_their_constants_go():
    constant = torch.arange(3.0)

    def function(x):
        unused = x + constant
        torch.sin(unused)
        return (x * 2,)

    module = make_fx(function)(torch.randn(3))
    assert len(module.graph.nodes) > 3
    module = eliminate(module)
    assert [n.op for n in module.graph.nodes] == ["placeholder", "call_function", "output"]
    assert not dict(module.named_buffers())


def test_unused_draws_stay():
    """The model draws them too, so what is drawn after them has the model's numbers."""

    def function(x):
        torch.rand(3)
        return (torch.nn.functional.dropout(x, 0.5),)

    module = eliminate(make_fx(function)(torch.randn(3)))
    assert [n.target for n in module.graph.nodes if n.op == "call_function"][0] is torch.ops.aten.rand.default
    x, v = torch.ones(64), torch.randn(1, 64)
    hd = fomoh_fx.transform(lambda x: function(x)[0].square().sum(), wrt="inputs")
    torch.manual_seed(0)
    out = hd(x, tangents=(v,))
    torch.manual_seed(0)
    torch.testing.assert_close(out.primal, function(x)[0].square().sum())


def test_unused_inputs_stay():
    module = eliminate(make_fx(lambda x, y: (x + 1,))(torch.randn(3), torch.randn(3)))
    assert len(module.graph.find_nodes(op="placeholder")) == 2
    assert isinstance(module, fx.GraphModule)


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace", None])
@pytest.mark.parametrize("name", MODELS)
def test_no_waste(name, second_order):
    no_waste(compiled(name, second_order=second_order)[1].compiled.final)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("directions", [1, 3])
def test_no_waste_with_a_loss(name, directions):
    no_waste(compiled(name, directions, loss=nn.CrossEntropyLoss())[1].compiled.final)


def test_no_waste_in_the_generalised_gauss_newton_plane():
    no_waste(compiled("mlp", loss=nn.CrossEntropyLoss(), curvature="ggn")[1].compiled.final)
