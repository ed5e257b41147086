"""Where parameters act, and the values at which their gradients are guessed."""

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.passes.sites import find_points, reductions
from fomoh_fx.passes.transposes import LOCAL, PRODUCTS, transposed

aten = torch.ops.aten


def normalized(model, loss, x, y):
    """The normalised graph, its parameters, its data and its loss."""
    hd = fomoh_fx.transform(model, loss, second_order=None)
    tangents = {name: torch.zeros(1, *p.shape) for name, p in hd.named_parameters()}
    latest = hd.trace(x, tangents=tangents, targets=(y,))
    module, inputs = hd.stages["normalize"], latest.program.inputs
    nodes = dict(zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True))
    parameters = [n for n, what in nodes.items() if what.kind == "parameter"]
    data = [n for n, what in nodes.items() if what.kind == "argument"]
    return module.graph, parameters, data, module.graph.output_node().args[0][0]


def points_of(model, x, y, loss=nn.functional.cross_entropy):
    graph, parameters, data, value = normalized(model, loss, x, y)
    return {p.node.name: sorted(n.name for n in p.parameters) for p in find_points(graph, parameters, data, value)}


def test_a_point_lies_behind_elementwise_operators_and_selections():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
    )
    found = points_of(model, torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0]))
    assert list(found) == ["linear_1", "tanh", "getitem"]
    assert found["getitem"] == ["_0_bias", "_0_weight"]


def test_layers_that_are_added_share_a_point():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
            self.position = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            x = x + self.position
            return self.outer(torch.tanh(self.inner(x)) + x)

    found = points_of(Residual(), torch.randn(3, 4), torch.tensor([0, 1, 2]))
    assert found == {"linear_1": ["outer_bias", "outer_weight"], "add_1": ["inner_bias", "inner_weight"],
                     "add": ["position"]}  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "count"),
    [
        (nn.functional.cross_entropy, 1),
        (lambda z, y: nn.functional.cross_entropy(z, y, label_smoothing=0.1), 2),
        (lambda z, y: nn.functional.cross_entropy(z, y, reduction="sum") / 7, 1),
        (lambda z, y: z.square().mean(1).sum() + z.sum(1).exp().mean(), 2),
        (lambda z, y: z.flatten().norm(), 0),
    ],
)
def test_reductions_are_what_the_loss_sums_last(loss, count):
    graph, parameters, _, value = normalized(nn.Linear(4, 3), loss, torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    assert len(reductions(graph, parameters, value)) == count


T = torch.randn
CALLS = {
    aten.linear.default: (T(2, 5, 4), T(3, 4), T(3)),
    aten.mm.default: (T(5, 4), T(4, 3)),
    aten.bmm.default: (T(2, 5, 4), T(2, 4, 3)),
    aten.convolution.default: (T(2, 3, 5, 5), T(4, 3, 3, 3), T(4), [2, 2], [1, 1], [1, 1], False, [0, 0], 1),
    aten.embedding.default: (T(6, 4), torch.tensor([[0, 5], [5, 2]]), 2),
    aten.add.Tensor: (T(2, 3, 4), T(3, 1)),
    aten.sub.Tensor: (T(4), T(2, 3, 4)),
    aten.mul.Tensor: (T(2, 3, 4), T(4)),
    aten.div.Tensor: (T(1, 4), T(2, 3, 4)),
    aten.max_pool2d_with_indices.default: (T(2, 3, 7, 7), [3, 3], [2, 2], [1, 1]),
    aten.permute.default: (T(2, 3, 4), [2, 0, -2]),
    aten.transpose.int: (T(2, 3, 4), 0, -1),
    aten.t.default: (T(2, 3),),
    aten.select.int: (T(2, 3, 4), 1, -1),
    aten.slice.Tensor: (T(2, 7, 4), 1, 1, 6, 2),
    aten.expand.default: (T(1, 3), [2, 4, 3]),
    aten._to_copy.default: (T(2, 3),),
    aten.clone.default: (T(2, 3),),
    aten.alias.default: (T(2, 3),),
    aten.view.default: (T(2, 6), [3, 4]),
    aten._unsafe_view.default: (T(2, 6), [3, 4]),
    aten.reshape.default: (T(2, 6).t(), [3, 4]),
    aten.unsqueeze.default: (T(2, 3), 1),
    aten.squeeze.default: (T(2, 1, 3),),
    aten.squeeze.dim: (T(2, 1, 3), 1),
    aten.squeeze.dims: (T(2, 1, 3, 1), [1, 3]),
}


@pytest.mark.parametrize("op", [*PRODUCTS, *LOCAL], ids=str)
def test_transposes(op):
    """<delta, phi(u)> = <phi^T delta, u> for the derivative phi with respect to each argument."""
    args = CALLS[op]
    for at in {**PRODUCTS, **LOCAL}[op]:

        def changed(x, at=at):
            y = op(*args[:at], x, *args[at + 1 :])
            return y[0] if isinstance(y, tuple) else y

        y, pull = torch.func.vjp(changed, args[at])
        delta = torch.randn_like(y)
        torch.testing.assert_close(transposed(op, at, delta, args, {}), pull(delta)[0], rtol=1e-4, atol=1e-4)
