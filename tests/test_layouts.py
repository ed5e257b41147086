"""Layouts: arguments, parameters and tangents that are not contiguous, and calls that differ in layout only."""

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import UnsupportedOpError
from tests.oracle import reverse_over_reverse


class Flattened(nn.Module):
    """Views that are legal for one layout only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def forward(self, x):
        return torch.tanh(self.layer(x.reshape(x.shape[0], -1)))


def layouts(x):
    """The same values in other layouts."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    return {
        "contiguous": x,
        "transposed": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "strided": wide[..., ::2],
    }


@pytest.mark.parametrize("order", [("contiguous", "transposed", "strided"), ("strided", "transposed", "contiguous")])
def test_the_layout_of_an_argument_changes_nothing(order):
    torch.manual_seed(0)
    model, x = Flattened().double(), torch.randn(4, 3, 4, dtype=torch.float64)
    hd = fomoh_fx.transform(model)
    tangents = {name: torch.randn(2, *p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    expected = fomoh_fx.transform(model)(x, tangents=tangents)
    for name in order:
        out = hd(layouts(x)[name], tangents=tangents)
        torch.testing.assert_close(out.cross, expected.cross)
    traced = len(hd._traced)
    for name in order:
        hd(layouts(x)[name], tangents=tangents)
    assert len(hd._traced) == traced


@pytest.mark.parametrize("wrt", ["parameters", "inputs"])
def test_the_layout_of_a_tangent_changes_nothing(wrt):
    torch.manual_seed(0)
    model, x = Flattened().double(), torch.randn(4, 3, 4, dtype=torch.float64)
    hd = fomoh_fx.transform(model, wrt=wrt)
    primals = dict(model.named_parameters()) if wrt == "parameters" else {"x": x}
    tangents = {name: torch.randn(2, *p.shape, dtype=torch.float64) for name, p in primals.items()}
    expected = hd(x, tangents=tangents)
    for layout in ("transposed", "strided"):
        out = hd(x, tangents={name: layouts(v)[layout] for name, v in tangents.items()})
        torch.testing.assert_close(out.cross, expected.cross)
    expanded = {name: v[:1].expand_as(v) for name, v in tangents.items()}
    torch.testing.assert_close(
        hd(x, tangents=expanded).cross, hd(x, tangents={name: v.clone() for name, v in expanded.items()}).cross
    )


def test_parameters_that_are_not_contiguous():
    torch.manual_seed(0)
    model, x = Flattened().double(), torch.randn(4, 3, 4, dtype=torch.float64)
    tangents = {name: torch.randn(2, *p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    hd = fomoh_fx.transform(model)
    expected = hd(x, tangents=tangents)
    model.layer.weight = nn.Parameter(layouts(model.layer.weight.detach())["transposed"])
    torch.testing.assert_close(hd(x, tangents=tangents).cross, expected.cross)


def test_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    tangents = {name: torch.randn(2, *p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    expected = fomoh_fx.transform(model)(x, tangents=tangents)
    model = model.to(memory_format=torch.channels_last)
    out = fomoh_fx.transform(model)(x.to(memory_format=torch.channels_last), tangents=tangents)
    torch.testing.assert_close(out.cross, expected.cross)


def test_a_kernel_whose_layout_is_not_the_traced_one():
    """Indexing gives its result the layout of the index, which PyTorch's fake tensors do not."""
    index = torch.arange(6).reshape(3, 2).t()

    def flattened(x):
        return x.exp()[index].unsqueeze(0).reshape(1, 6).square().flip(1).sum()

    x = torch.rand(6, dtype=torch.float64)
    out = fomoh_fx.transform(flattened, wrt="inputs")(x, tangents=(torch.ones(1, 6, dtype=torch.float64),))
    torch.testing.assert_close(out.tangent[0], 2 * (2 * x).exp().sum())
    torch.testing.assert_close(out.cross[0], 4 * (2 * x).exp().sum())


BASE = torch.randn(12, dtype=torch.float64)


def scattered(x):
    y = x * 1
    y.as_strided((2,), (1,), 1).mul_(x.sin().sum())
    return y.square()


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x * 1).as_strided((2,), (1,), 1).sin(),  # of a tensor that is left out
        lambda x: x.clone().as_strided((2, 2), (1, 1)).sin(),
        lambda x: x.as_strided((2,), (2,)).sin(),
        scattered,
    ],
    ids=["of a product", "of a copy", "from its start", "changed in place"],
)
def test_what_goes_by_memory(f):
    """Calls with arguments that begin elsewhere in their storage."""
    hd = fomoh_fx.transform(f, wrt="inputs")
    v = torch.randn(2, 3, dtype=torch.float64)
    for x in (BASE[3:6], BASE[4:7], BASE[:3], BASE[5:8].clone()):
        out = hd(x, tangents=(v,))
        y, tangents, crosses = reverse_over_reverse(lambda x: f(x).sum(), [x], [v])
        torch.testing.assert_close(out.primal.sum(), y)
        torch.testing.assert_close(out.tangent.flatten(1).sum(1), tangents)
        torch.testing.assert_close(out.hessian().flatten(2).sum(2), crosses)


def test_an_offset_in_the_storage_of_an_argument():
    """The graph holds for the offset that it was captured with; what is outside of the argument is not seen by it."""
    hd = fomoh_fx.transform(lambda x: x.as_strided((2,), (1,), 4).sin(), wrt="inputs")
    told = fomoh_fx.transform(lambda x: x * x.storage_offset(), wrt="inputs")
    v = torch.ones(1, 3, dtype=torch.float64)
    for x in (BASE[3:6], BASE[4:7], BASE[2:9][2:5]):
        torch.testing.assert_close(hd(x, tangents=(v,)).tangent[0], BASE[4:6].cos())
    for x in (BASE[:3], BASE[5:8]):
        torch.testing.assert_close(told(x, tangents=(v,)).primal, x * x.storage_offset())
        with pytest.raises(UnsupportedOpError, match="outside of its argument"):
            hd(x, tangents=(v,))
    with pytest.raises(UnsupportedOpError, match="outside of its argument"):
        fomoh_fx.transform(lambda x, y: x[:3].sin() * y[1:].as_strided((3,), (1,), 0), wrt="inputs")(
            BASE[:3], BASE[:4], tangents=(v, None)
        )


def test_strides_of_a_buffer():
    model = nn.Linear(3, 2).double()
    model.register_buffer("table", torch.randn(3, 3, dtype=torch.float64))
    hd = fomoh_fx.transform(lambda x: model(x) * model.table.as_strided((2,), (3,)), wrt="inputs")
    x, v = BASE[:3], torch.ones(1, 3, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(hd(x, tangents=(v,)).primal, model(x) * model.table.as_strided((2,), (3,)))
        model.table = model.table.t()
