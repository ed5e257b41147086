"""Each rewrite: the operators before and after, and the same result."""

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch.fx.experimental.proxy_tensor import make_fx

from fomoh_fx.passes.eliminate import eliminate
from fomoh_fx.passes.simplify import simplify
from fomoh_fx.passes.verify import check_values

aten = torch.ops.aten
X = torch.randn(2, 3, 4)


def operators(module):
    return [str(n.target).removeprefix("aten.") for n in module.graph.nodes if n.op == "call_function"]


def simplified(function, *inputs, tracing_mode="fake"):
    """The operators after simplification; the result must be the same."""
    module = make_fx(lambda *xs: (function(*xs),), tracing_mode=tracing_mode)(*inputs)
    before = len(operators(module))
    module = eliminate(simplify(module))
    assert len(operators(module)) <= before
    if tracing_mode == "fake":
        check_values(module)
    torch.testing.assert_close(module(*inputs)[0], function(*inputs), rtol=0, atol=0)
    return operators(module)


VIEWS = {
    "view of view": (lambda x: aten.view(aten.view(x, [6, 4]), [8, 3]), ["view.default"]),
    "view and back": (lambda x: aten.view(aten.view(x, [6, 4]), [2, 3, 4]), []),
    "view of itself": (lambda x: aten.view(x, [2, 3, 4]), []),
    "unsqueeze and squeeze": (lambda x: aten.squeeze(aten.unsqueeze(x, 1), 1), []),
    "view of an unsqueeze": (lambda x: aten.view(aten.unsqueeze(x, 1), [6, 4]), ["view.default"]),
    "permute of permute": (lambda x: x.permute(1, 2, 0).permute(0, 2, 1), ["permute.default"]),
    "permute and back": (lambda x: x.permute(1, 2, 0).permute(2, 0, 1), []),
    "transpose and back": (lambda x: x.transpose(0, -1).transpose(-1, 0), []),
    "transpose of permute": (lambda x: x.permute(1, 0, 2).transpose(0, 1), []),
    "permute to itself": (lambda x: x.permute(0, 1, 2), []),
    "transposed matrix and back": (lambda x: aten.t(aten.t(x[0])), ["select.int"]),
    "expand to itself": (lambda x: aten.expand(x, [2, 3, 4]), []),
    "expand of expand": (lambda x: x[:, :1].expand(2, 3, 4).expand(5, 2, 3, 4), ["slice.Tensor", "expand.default"]),
    "whole slice": (lambda x: aten.slice(x, 1, 0, 9223372036854775807), []),
    "whole slice by its end": (lambda x: aten.slice(x, 1, 0, 3), []),
    "split into one": (lambda x: aten.split(x, 3, 1)[0], []),
    "cat of one": (lambda x: aten.cat([x], 1) + x, ["add.Tensor"]),
    "copy": (lambda x: aten.clone(x) + x, ["add.Tensor"]),
    "contiguous copy": (lambda x: aten.clone(x, memory_format=torch.contiguous_format) + x, ["add.Tensor"]),
    "permute of an axis of one element": (
        lambda x: x.unsqueeze(0).permute(1, 2, 0, 3).sin(),
        ["reshape.default", "sin.default"],
    ),
    "permute and reshape": (
        lambda x: x[:, None].permute(1, 0, 2, 3).reshape(6, 4).sin(),
        ["view.default", "sin.default"],
    ),
    "expand by axes of one element": (lambda x: x.expand(1, 2, 3, 4).sin(), ["reshape.default", "sin.default"]),
    "copy for a view": (lambda x: x.transpose(0, 1).reshape(3, 8), ["transpose.int", "reshape.default"]),
    "repeat once": (lambda x: aten.repeat(x, [1, 1, 1]) + x, ["add.Tensor"]),
    "conversion to the own dtype": (lambda x: aten._to_copy(x, dtype=torch.float32) + x, ["add.Tensor"]),
    "conversion and back": (lambda x: x.double().float() + x, ["add.Tensor"]),
    "padding by nothing": (lambda x: aten.constant_pad_nd(x, [0, 0, 0, 0], 1.0) + x, ["add.Tensor"]),
    "sum over one": (lambda x: aten.sum(x[:, :1], [1], True) + x, ["slice.Tensor", "add.Tensor"]),
}
KEPT = {
    "view of a copy of what has such a view": lambda x: aten.view(x[:, :2].contiguous(), [2, 4, 2]),
    "two views of one copy": lambda x: (c := x.transpose(0, 1).contiguous()).view(3, 8) @ c.view(8, 3),
    "view of a transposed view": lambda x: aten.view(aten.view(x.transpose(0, 1), [3, 2, 2, 2]), [3, 2, 4, 1]),
    "half a slice": lambda x: aten.slice(x, 1, 0, 2),
    "conversion to less and back": lambda x: x.half().float(),
    "copy for its layout": lambda x: aten.clone(x.transpose(0, 1), memory_format=torch.contiguous_format),
    "padding and cropping": lambda x: aten.constant_pad_nd(x, [1, -1], 0.0),
    "a conversion": lambda x: x.double().sin(),
}
ARITHMETIC = {
    "times one": (lambda x: (x * 1).sin(), ["sin.default"]),
    "times ones": (lambda x: (x * torch.ones_like(x)).sin(), ["sin.default"]),
    "ones times": (lambda x: (torch.ones_like(x) * x).sin(), ["sin.default"]),
    "by one": (lambda x: (x / 1).sin(), ["sin.default"]),
    "plus zero": (lambda x: (x + 0).sin(), ["sin.default"]),
    "plus zeros": (lambda x: (x + torch.zeros(4)).sin(), ["sin.default"]),
    "zeros plus": (lambda x: (torch.full_like(x, 0.0) + x).sin(), ["sin.default"]),
    "minus zero": (lambda x: (x - 0.0).sin(), ["sin.default"]),
    "to the power of one": (lambda x: (x**1).sin(), ["sin.default"]),
    "negated twice": (lambda x: aten.neg(aten.neg(x)).sin(), ["sin.default"]),
    "plus a negative": (lambda x: x + aten.neg(x[:1]), ["slice.Tensor", "sub.Tensor"]),
    "negative plus": (lambda x: aten.neg(x[:1]) + x, ["slice.Tensor", "sub.Tensor"]),
    "where both are the same": (lambda x: torch.where(x > 0, x, x).sin(), ["sin.default"]),
    "where the other is zeros": (
        lambda x: aten.where(x > 0, x, torch.zeros_like(x)),
        ["gt.Scalar", "where.ScalarOther"],
    ),
    "where this is a number": (
        lambda x: aten.where(x > 0, torch.scalar_tensor(-float("inf")), x),
        ["gt.Scalar", "where.ScalarSelf"],
    ),
}
ARITHMETIC_KEPT = {
    "view of a copy of what has such a view": lambda x: aten.view(x[:, :2].contiguous(), [2, 4, 2]),
    "two views of one copy": lambda x: (c := x.transpose(0, 1).contiguous()).view(3, 8) @ c.view(8, 3),
    "one by": lambda x: aten.reciprocal(x) * 2,
    "zero minus": lambda x: torch.zeros_like(x) - x,
    "times one in another shape": lambda x: (x[:, :1] * torch.ones_like(x)).sin(),
    "times one in another dtype": lambda x: (x * torch.ones(4, dtype=torch.float64)).sin(),
    "zeros plus a multiple": lambda x: torch.add(torch.zeros_like(x), x, alpha=2),
    "where zeros widen": lambda x: aten.where(x[:, :1] > 0, x[:, :1], torch.zeros_like(x)),
    "where a number is rounded": lambda x: aten.where(x.double() > 0, x.double(), torch.full_like(x, 0.1)),
}


@pytest.mark.parametrize("name", [*VIEWS, *ARITHMETIC])
def test_rewrite(name):
    function, after = {**VIEWS, **ARITHMETIC}[name]
    assert simplified(function, X) == after


@pytest.mark.parametrize("name", [*KEPT, *ARITHMETIC_KEPT])
def test_kept(name):
    function = {**KEPT, **ARITHMETIC_KEPT}[name]
    assert simplified(function, X) == operators(make_fx(function, tracing_mode="fake")(X))


def test_returned_values_stay_memory_of_their_own():
    assert simplified(torch.clone, X) == ["clone.default"]
    assert simplified(lambda x: (x * 1).view(6, 4), X) == ["mul.Tensor", "view.default"]
    module = make_fx(lambda x: (x.sin(), x.sin().clone()))(X)
    assert operators(simplify(module)) == ["sin.default", "sin.default"]


@pytest.mark.parametrize("name", ["view and back", "permute and back", "whole slice", "times one", "plus zeros"])
def test_symbolic_sizes_get_no_guard(name):
    function, after = {**VIEWS, **ARITHMETIC}[name]
    sized = {
        "view and back": lambda x: x.view(x.shape[0], -1).view(x.shape),
        "plus zeros": lambda x: (x + torch.zeros_like(x)).sin(),
    }.get(name, function)
    module = make_fx(lambda x: (sized(x),), tracing_mode="symbolic")(X)
    environment = next(n for n in module.graph.nodes if n.op == "placeholder").meta["val"].fake_mode.shape_env
    guards = len(environment.guards)
    module = eliminate(simplify(module))
    assert len(environment.guards) == guards
    assert [name for name in operators(module) if "sym_size" not in name] == after
    other = torch.randn(7, 3, 4)
    torch.testing.assert_close(module(other)[0], sized(other))


STEPS = {
    "transpose": lambda x: x.transpose(0, -1),
    "permute": lambda x: x.permute(2, 0, 1),
    "flatten and back": lambda x: x.reshape(-1).view(x.shape),
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "contiguous": lambda x: x.contiguous(),
    "expand": lambda x: x.expand(x.shape),
    "reshape": lambda x: x.reshape(x.shape[0], -1).reshape(x.shape[1], x.shape[0], x.shape[2]),
    "halve": lambda x: x[:, : max(1, x.shape[1] // 2)],
    "once": lambda x: x * 1 + 0,
    "negate": lambda x: -x,
    "choose": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "sum": lambda x: x.sum(1, keepdim=True),
}


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(strategies.lists(strategies.sampled_from(sorted(STEPS)), min_size=1, max_size=6))
@hypothesis.example(["transpose", "flatten and back", "reshape"])
def test_any_chain_keeps_its_result(steps):
    def function(x):
        for step in steps:
            x = STEPS[step](x)
        return x

    simplified(function, X)
