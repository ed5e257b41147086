"""Sums with products become single operators where nothing else changes."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fomoh_fx
from fomoh_fx.passes.fuse import fuse
from fomoh_fx.passes.verify import check_values
from tests.oracle import relative_error
from tests.passes.test_simplify import operators

X, Y, Z = torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def fused(function, *inputs):
    """The operators after the pass; the result must be the same up to one rounding."""
    module = fuse(make_fx(lambda *xs: (function(*xs),), tracing_mode="fake")(*inputs))
    check_values(module)
    result, expected = module(*inputs)[0], function(*inputs)
    torch.testing.assert_close(result, expected)
    assert (result.dtype, result.stride()) == (expected.dtype, expected.stride())
    return operators(module)


FUSED = {
    "sum with a product": (lambda x, y, z: x + y * z, ["addcmul.default"]),
    "product first": (lambda x, y, z: y * z + x, ["addcmul.default"]),
    "difference": (lambda x, y, z: x - y * z, ["addcmul.default"]),
    "square": (lambda x, y, z: x + y * y, ["addcmul.default"]),
    "broadcast": (lambda x, y, z: x[0] + y * z[:, :1], ["select.int", "slice.Tensor", "addcmul.default"]),
    "two products": (lambda x, y, z: x * y + y * z, ["mul.Tensor", "addcmul.default"]),
}
KEPT = {
    "a product of two uses": lambda x, y, z: (y * z).sin() + y * z * 3,
    "a product and itself": lambda x, y, z: (lambda product: product + product)(y * z),
    "twice": lambda x, y, z: x + y * 2,
    "a scaled sum": lambda x, y, z: torch.add(x, y * z, alpha=3),
    "minus a product": lambda x, y, z: y * z - x,
    "a wider dtype": lambda x, y, z: x + y.float() * z.float(),
    "whole numbers": lambda x, y, z: x.long() + y.long() * z.long(),
    "another layout": lambda x, y, z: y.t() * z.t() + x.reshape(3, 2),
    "complex numbers": lambda x, y, z: (x + 1j) + (y + 1j) * (z + 1j),
    "a number": lambda x, y, z: 1 + y * z,
}


@pytest.mark.parametrize("name", FUSED)
def test_fused(name):
    function, after = FUSED[name]
    assert fused(function, X, Y, Z) == after


@pytest.mark.parametrize("name", KEPT)
def test_kept(name):
    assert fused(KEPT[name], X, Y, Z) == operators(make_fx(KEPT[name], tracing_mode="fake")(X, Y, Z))


def test_dynamic_sizes_get_no_guard():
    module = make_fx(lambda x, y, z: x + y * z, tracing_mode="symbolic")(X, Y[:1], Z)
    environment = next(n for n in module.graph.nodes if n.op == "placeholder").meta["val"].fake_mode.shape_env
    guards = len(environment.guards)
    assert operators(fuse(module)) == ["addcmul.default"]
    assert len(environment.guards) == guards


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_once(dtype):
    x, y, z = (t.to(dtype) for t in (X, Y, Z))
    module = fuse(make_fx(lambda *xs: (xs[0] + xs[1] * xs[2],), tracing_mode="fake")(x, y, z))
    assert operators(module) == ["addcmul.default"]
    exact = x.double() + y.double() * z.double()
    assert bool(((module(x, y, z)[0] - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all())


def test_the_product_rule_takes_two_operators_for_each_component():
    hd = fomoh_fx.transform(torch.mul, wrt="inputs")
    out = hd(X, Y, tangents=(torch.ones(1, 2, 3, dtype=X.dtype), Z[None]))
    counts = {c: n for c, n in hd.report().nodes["eliminate"].items() if c != "primal"}
    assert counts == {"tangent": 2, "cross": 2}
    assert relative_error(out.cross[0], 2 * Z) < 1e-15
