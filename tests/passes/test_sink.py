"""What an expansion repeats is computed once, where nothing else changes."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fomoh_fx.passes.provenance import KEY, Provenance
from fomoh_fx.passes.sink import sink
from fomoh_fx.passes.verify import check_values
from tests.passes.test_simplify import operators

aten = torch.ops.aten
GENERATOR = torch.Generator().manual_seed(0)
ROW, FULL, W = (torch.randn(*size, dtype=torch.float64, generator=GENERATOR) for size in ((3, 1, 4), (3, 5, 4), (6, 4)))


def sunk(function, *inputs, component="tangent", tracing_mode="fake"):
    """The shape of every value after the pass, by its operator; the result must be the same."""
    module = make_fx(lambda *xs: (function(*xs) + 1,), tracing_mode=tracing_mode, pre_dispatch=True)(*inputs)
    for node in module.graph.nodes:
        node.meta[KEY] = Provenance(node.name, component)
    before = operators(module)
    module = sink(module)
    module.graph.lint()
    check_values(module)
    torch.testing.assert_close(module(*inputs)[0], function(*inputs) + 1)
    return before, [
        (str(n.target).removeprefix("aten."), n.meta["val"].shape)
        for n in module.graph.nodes
        if isinstance(n.meta.get("val"), torch.Tensor) and n.op == "call_function"
    ]


def linear(x, w):
    return aten.linear.default(x, w)


def summed(x, dims, keepdim=True):
    return aten.sum.dim_IntList(x, dims, keepdim)


MOVED = {
    "rows of a product": (lambda r, f, w: linear(r.expand(3, 5, 4), w), "linear.default", (3, 1, 6)),
    "rows without an axis": (lambda r, f, w: linear(r[0, 0].expand(5, 4), w), "linear.default", (6,)),
    "a number": (lambda r, f, w: r.expand(3, 5, 4) * 2, "mul.Tensor", (3, 1, 4)),
    "a negative": (lambda r, f, w: -r.expand(3, 5, 4), "neg.default", (3, 1, 4)),
    "a square": (lambda r, f, w: (x := r.expand(3, 5, 4)) * x, "mul.Tensor", (3, 1, 4)),
    "what is alike": (lambda r, f, w: r.expand(3, 5, 4) / w[0], "div.Tensor", (3, 1, 4)),
    "a longer one": (lambda r, f, w: r[0].expand(5, 4) + f[:, :1], "add.Tensor", (3, 1, 4)),
    "a sum over others": (lambda r, f, w: summed(r.expand(3, 5, 4), [0]), "sum.dim_IntList", (1, 1, 4)),
    "one after another": (lambda r, f, w: linear(r.expand(3, 5, 4) * 2, w) - 1, "sub.Tensor", (3, 1, 6)),
}  # fmt: skip
KEPT = {
    "all rows": lambda r, f, w: r.expand(3, 5, 4) * f,
    "the columns of a product": lambda r, f, w: linear(r[..., :1].expand(3, 1, 4), w),
    "a sum over what is repeated": lambda r, f, w: summed(r.expand(3, 5, 4), [1]),
    "a sum over all axes": lambda r, f, w: summed(r.expand(3, 5, 4), []),
    "a product with a vector": lambda r, f, w: linear(r.expand(3, 5, 4), w[0]),
    "a bias for each row": lambda r, f, w: aten.linear.default(r[0].expand(5, 4), w, f[0, :, :1]),
    "a product with itself": lambda r, f, w: linear(x := r[0].expand(5, 4), x),
    "a sum that leaves no axis": lambda r, f, w: summed(r.expand(3, 5, 4), [0], False),
    "two axes, one of them needed": lambda r, f, w: r[:1].expand(3, 5, 4) + f[:, :1],
}


@pytest.mark.parametrize("name", MOVED)
def test_moved(name):
    function, operator, shape = MOVED[name]
    _, after = sunk(function, ROW, FULL, W)
    assert (operator, shape) in after


@pytest.mark.parametrize("name", KEPT)
def test_kept(name):
    before, after = sunk(KEPT[name], ROW, FULL, W)
    assert [operator for operator, _ in after] == before


def test_dynamic_sizes():
    def function(r, f, w):
        return linear(r.expand(3, f.shape[1], 4), w) * 2

    _, after = sunk(function, ROW, FULL, W, tracing_mode="symbolic")
    assert ("linear.default", (3, 1, 6)) in after and ("mul.Tensor", (3, 1, 6)) in after


def test_the_models_own_values_are_computed_as_it_says():
    before, after = sunk(MOVED["rows of a product"][0], ROW, FULL, W, component="primal")
    assert [operator for operator, _ in after] == before


def test_a_returned_value_is_memory_of_its_own():
    module = make_fx(lambda r: (r.expand(3, 5, 4) * 2,), tracing_mode="fake")(ROW)
    for node in module.graph.nodes:
        node.meta[KEY] = Provenance(node.name, "tangent")
    assert sink(module)(ROW)[0].stride() == (20, 4, 1)
