"""Directions that are the same for all samples, given by ``expand``: the same numbers from less work."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fomoh_fx
from tests.oracle import relative_error

N, D = 6, 4


def units(*shape, dtype=torch.float64):
    """Every unit vector of one sample, [K, N, *shape], in memory once for all N."""
    size = torch.Size(shape).numel()
    return torch.eye(size, dtype=dtype).reshape(size, 1, *shape).expand(size, N, *shape)


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 1)), (D,)),
    "scaled": (lambda: lambda x: torch.sin((x - x.detach().mean(0)) / 3 * torch.arange(1.0, D + 1).double()), (D,)),
    "joined": (lambda: lambda x: torch.cat([x, 2 * x, x**2], 1).exp().prod(1), (D,)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.ELU(), nn.Flatten(), nn.Linear(12, 1)),
        (2, 3, 3),
    ),
    "samples meet": (lambda: nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Sigmoid(), nn.Linear(5, 2)), (D,)),
    "attention": (lambda: nn.TransformerEncoderLayer(D, 2, 8, 0.0, batch_first=True), (3, D)),
    "linear": (lambda: nn.Linear(D, 3), (D,)),
    "itself": (lambda: lambda x: x, (D,)),
    "a vector as weight": (lambda: lambda x: nn.functional.linear(x, torch.arange(1.0, D + 1).double()), (D,)),
    "a vector as weight, a square": (lambda: lambda x: nn.functional.linear(x, x[0].detach()).square(), (D,)),
    "a bias for each row": (
        lambda: lambda x: nn.functional.linear(x, torch.ones(3, D).double(), torch.arange(6.0).double()[:, None]),
        (D,),
    ),
    "names": (lambda: lambda x: torch.arange(N)[:, None].expand(N, D).sin() * x.expand(2, N, D).sin(), (D,)),
    "taken along an axis": (
        lambda: lambda x: torch.take_along_dim(x, torch.tensor([[0], [2], [1], [1], [3], [0]]), 1).sin(),
        (D,),
    ),
    "transposed": (lambda: lambda x: (x.t() @ x).logsumexp(0), (D,)),
}


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace", None])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers_as_of_tangents_that_are_written_out(name, second_order):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make()
    model = model.double() if isinstance(model, nn.Module) else model
    x, v = torch.randn(N, *shape, dtype=torch.float64), units(*shape)[:5]
    hd = fomoh_fx.transform(model, wrt="inputs", second_order=second_order)
    once, whole = hd(x, tangents=(v,)), hd(x, tangents=(v.contiguous(),))
    assert once.tangent.shape == whole.tangent.shape
    assert relative_error(once.tangent, whole.tangent) < 1e-12
    if second_order:
        assert once.cross.shape == whole.cross.shape
        assert relative_error(once.cross, whole.cross) < 1e-12


def flops(model, x, v):
    hd = fomoh_fx.transform(model, wrt="inputs", second_order="trace", first_order=False)
    hd(x, tangents=(v,))
    with FlopCounterMode(display=False) as counter:
        hd(x, tangents=(v,))
    return counter.get_total_flops() // 2


def test_the_first_layer_has_one_row_for_each_direction():
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x, v = torch.randn(N, D, dtype=torch.float64), units(D)
    after_the_first = N * (D + 2) * 8 * 16 + 2 * N * 16  # tangents are not asked for, so the last layer has none
    assert flops(model, x, v) == (N + D) * D * 8 + after_the_first
    assert flops(model, x, v.contiguous()) == (N + N * D) * D * 8 + after_the_first


def test_the_graph_takes_one_element_for_each_axis_that_is_alike():
    hd = fomoh_fx.transform(lambda x: x.sin().sum(), wrt="inputs")
    x = torch.randn(2, 3, 4)
    hd(x, tangents=(torch.randn(5, 1, 3, 1).expand(5, 2, 3, 4),))
    assert hd.stages["expand"].graph.find_nodes(op="placeholder")[-1].meta["val"].shape == (5, 1, 3, 1)


def test_one_direction_repeated_is_written_out():
    hd = fomoh_fx.transform(lambda x: (x**3).sum(), wrt="inputs")
    x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
    out = hd(x, tangents=(v.expand(3, 2),))
    torch.testing.assert_close(out.tangent, torch.full((3,), 15.0))
    torch.testing.assert_close(out.cross, torch.full((6,), 18.0))


def test_a_dynamic_batch():
    torch.manual_seed(0)
    model = MODELS["mlp"][0]().double()
    hd = fomoh_fx.transform(model, wrt="inputs", second_order="trace")
    batch = torch.export.Dim("batch", min=2)
    hd.trace(torch.randn(N, D).double(), tangents=(units(D),), dynamic_shapes={"input": {0: batch}})
    for n in (2, 3, 9):
        x, v = torch.randn(n, D, dtype=torch.float64), units(D)[:, :1].expand(D, n, D)
        reference = fomoh_fx.transform(model, wrt="inputs", second_order="trace")(x, tangents=(v.contiguous(),))
        assert relative_error(hd(x, tangents=(v,)).cross, reference.cross) < 1e-12
    assert len(hd._traced) == 1


def test_under_dynamo():
    """What was traced for tangents that are alike serves them alone."""
    model, x, v = MODELS["mlp"][0]().double(), torch.randn(N, D, dtype=torch.float64), units(D)
    hd = fomoh_fx.transform(model, wrt="inputs", second_order="trace")
    expected = hd(x, tangents=(v,)).cross
    compiled = torch.compile(hd, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, tangents=(v,)).cross, expected)
    with pytest.raises(Exception, match="not traced"):
        compiled(x, tangents=(v.contiguous(),))
    hd(x, tangents=(v.contiguous(),))
    torch.testing.assert_close(compiled(x, tangents=(v.contiguous(),)).cross, expected)


@pytest.mark.parametrize("wrt", ["parameters", "inputs"])
def test_tangents_of_any_layout_under_dynamo(wrt):
    model, x = nn.Linear(D, 3).double(), torch.randn(N, D, dtype=torch.float64)
    hd = fomoh_fx.transform(model, lambda y: y.square().sum(), wrt=wrt)
    transposed = torch.randn(2, D, {"parameters": 3, "inputs": N}[wrt], dtype=torch.float64).mT
    tangents = {"weight": transposed} if wrt == "parameters" else (transposed,)
    expected = hd(x, tangents=tangents).cross
    torch._dynamo.reset()
    compiled = torch.compile(hd, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, tangents=tangents).cross, expected)
