"""Sums with products: what becomes one operator, what stays, and the same result."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

import fomoh_fx
from fomoh_fx.passes.fuse import fuse_products_into_sums
from fomoh_fx.passes.provenance import KEY, Provenance
from fomoh_fx.passes.verify import check_values, verify

aten = torch.ops.aten
A, B, C = torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def fused(function, *inputs, component="tangent"):
    """The operators afterwards; the result must be the same."""
    module = make_fx(lambda *xs: (function(*xs),), tracing_mode="fake")(*inputs)
    for node in module.graph.nodes:
        node.meta[KEY] = Provenance(node.name, component)
    module = fuse_products_into_sums(module)
    verify(module, "fuse")
    check_values(module)
    found, expected = module(*inputs)[0], function(*inputs)
    rounding = {"rtol": 1e-2, "atol": 1e-2} if expected.dtype == torch.half else {}
    torch.testing.assert_close(found, expected, **rounding)
    return [str(n.target).removeprefix("aten.") for n in module.graph.nodes if n.op == "call_function"]


SUMS = {
    "product on the right": lambda a, b, c: a + b * c,
    "product on the left": lambda a, b, c: b * c + a,
    "difference": lambda a, b, c: a - b * c,
    "number after": lambda a, b, c: a + b * c * 2,
    "number before": lambda a, b, c: a + (2 * b) * c * 3,
    "number and difference": lambda a, b, c: a - (b * c) * 0.5,
    "square": lambda a, b, c: a + b * b,
    "broadcast": lambda a, b, c: a[:1] + b * c[:, :1],
    "half precision": lambda a, b, c: a.half() + b.half() * c.half(),
}
OTHERS = {
    "difference from a product": lambda a, b, c: b * c - a,
    "number alone": lambda a, b, c: a + b * 2,
    "sum with a factor": lambda a, b, c: torch.add(a, b * c, alpha=2),
    "whole numbers": lambda a, b, c: a.long() + b.long() * c.long(),
    "another dtype": lambda a, b, c: a + b.float() * c.float(),
    "a number": lambda a, b, c: b * c + 1,
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_with_a_product_is_one_operator(name):
    found = fused(SUMS[name], A, B, C)
    assert "addcmul.default" in found
    assert "add.Tensor" not in found
    assert "sub.Tensor" not in found
    assert "mul.Tensor" not in found or name == "number before"  # 2 b is a factor of its own


@pytest.mark.parametrize("name", OTHERS)
def test_other_sums_stay(name):
    assert "addcmul.default" not in fused(OTHERS[name], A, B, C)


def test_a_product_that_is_used_twice_stays():
    found = fused(lambda a, b, c: (a + b * c) * (b * c).sum(), A, B, C)
    assert found.count("addcmul.default") == 1  # make_fx records the product twice

    def shared(a, b, c):
        product = b * c
        return (a + product) * product

    assert "addcmul.default" not in fused(shared, A, B, C)


def test_the_primal_stays_as_it_was_written():
    assert fused(SUMS["square"], A, B, C, component="primal") == ["mul.Tensor", "add.Tensor"]


def test_the_product_rule_is_two_operators_for_each_derivative():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

        def forward(self, x):
            return (x * self.w).tanh() * self.b

    hd = fomoh_fx.transform(Product(), functional.mse_loss)
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    hd.trace(x, tangents={"w": torch.randn(1, 3), "b": torch.randn(1, 3)}, targets=(y,))
    last = [n for n in hd.stages["eliminate"].graph.nodes if n.name.startswith("mul_1_")]
    operators = [n.target for n in last if n.target is not aten.reshape.default]
    assert operators.count(aten.addcmul.default) == 2
    assert operators.count(aten.mul.Tensor) == 2


def test_the_bodies_of_control_flow_stay():
    """What they return has to keep its layout."""

    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, dtype=torch.float64))

        def forward(self, x):
            return self.w * torch.cond(x.sum() > 0, lambda x: x.sin() * self.w + x, lambda x: x * self.w, (x,))

    hd = fomoh_fx.transform(Switch(), functional.mse_loss)
    x, y = torch.ones(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    hd.trace(x, tangents={"w": torch.randn(2, 3, dtype=torch.float64)}, targets=(y,))
    final = hd.stages["eliminate"]
    inner = [part for part in final.modules() if isinstance(part, torch.fx.GraphModule) and part is not final]
    assert inner
    assert not any(n.target is aten.addcmul.default for part in inner for n in part.graph.nodes)
    assert any(n.target is aten.addcmul.default for n in final.graph.nodes)
