"""The registry: an operator without a test is a failing test; operators of one's own; misuse."""

import importlib
import pkgutil

import pytest
import torch
from torch import Tensor

import fomoh_fx
import tests.rules
from fomoh_fx.errors import ArgumentError, UnsupportedOpError
from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.rules.kinds import Composite, bilinear, constant, elementwise, from_jvp, gated, linear
from fomoh_fx.rules.registry import COMPOSITES, KINDS, RULES
from tests.oracle import relative_error, reverse_over_reverse

aten = torch.ops.aten

# Every operator has a sample.


def tested() -> set:
    """The operators in SAMPLES of a test file here, or in TESTED_OTHERWISE where tests of their own cover them."""
    found = set()
    for module in pkgutil.iter_modules(tests.rules.__path__, "tests.rules."):
        if module.name.startswith("tests.rules.test_"):
            listed = vars(importlib.import_module(module.name))
            found |= {op for op, samples in listed.get("SAMPLES", {}).items() if samples}
            found |= set(listed.get("TESTED_OTHERWISE", ()))
    return found


#: Each of these has a test function below.
REFUSED = [op for op, kind in KINDS.items() if kind == "refused"]
TESTED_OTHERWISE = [*REFUSED, torch.ops.fomoh_fx.with_value.default]


def test_every_operator_is_tested():
    own = [op for op in (*RULES, *COMPOSITES) if not op.namespace.startswith("fomoh_fx_")]  # those are the tests' own
    missing = sorted(str(op) for op in set(own) - tested())
    assert not missing, f"no sample for {', '.join(missing)}"


@pytest.mark.parametrize("op", REFUSED, ids=str)
def test_refused_operator(op):
    with pytest.raises(UnsupportedOpError):
        RULES[op](op, Components(1, None))


def second_order_of(model) -> tuple[float, float, float]:
    """The value of a function of one number at 1.5, and its two derivatives."""
    x = torch.tensor(1.5, dtype=torch.float64)
    out = fomoh_fx.transform(model, wrt="inputs")(x, tangents=[torch.ones(1, dtype=torch.float64)])
    return float(out.primal), float(out.tangent), float(out.cross)


def test_with_value():
    """A value changed in place under no_grad keeps its derivative, as in reverse mode."""

    def model(x: Tensor) -> Tensor:
        y = x * 3
        with torch.no_grad():
            y.add_(1)
        return y**2

    assert second_order_of(model) == (5.5**2, 2 * 5.5 * 3, 2 * 9)


class Cube(torch.autograd.Function):
    """x^3, with a derivative of its own: 4 x^2."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return 4 * ctx.saved_tensors[0] ** 2 * g


def test_custom_function():
    assert second_order_of(Cube.apply) == (1.5**3, 4 * 1.5**2, 8 * 1.5)


def test_supported_ops_lists_names_and_kinds():
    listed = fomoh_fx.supported_ops()
    expected = {
        "aten::tanh": "elementwise", "aten::relu": "gated", "aten::mm": "bilinear", "aten::permute": "linear",
        "aten::glu": "composite", "aten::floor": "constant",
    }  # fmt: skip
    assert {name: listed.get(name) for name in expected} == expected
    assert list(listed) == sorted(listed) and len(listed) == len(KINDS)


# Operators of one's own: one for each kind, checked through the whole compiler.

MINE = "fomoh_fx_test"
library = torch.library.Library(MINE, "DEF")


def define(schema: str, function) -> torch._ops.OpOverload:
    """A new operator that PyTorch knows nothing of but its value."""
    name = schema.split("(")[0]
    library.define(f"{schema} -> Tensor")
    library.impl(name, function, "CompositeExplicitAutograd")
    return getattr(getattr(torch.ops, MINE), name).default


swish = define("swish(Tensor x, float beta=1.0)", lambda x, beta=1.0: x * torch.sigmoid(beta * x))
clip = define("clip(Tensor x)", lambda x: x.clamp(min=0.1))
reverse = define("reverse(Tensor x, int dim)", lambda x, dim: x.flip(dim) * 2)
outer = define("outer(Tensor x, Tensor w)", lambda x, w: x[:, None] * w)
rounded = define("rounded(Tensor x)", lambda x: x.round() + 0.0)
cube = define("cube(Tensor x)", lambda x: x**3)
softsign = define("softsign(Tensor x)", lambda x: x / (1 + x.abs()))
unknown = define("unknown(Tensor x)", lambda x: x.sin())


def cube_push(op, active, tangents, x: Tensor) -> Tensor:
    return 3 * x**2 * tangents[0]


OWN = {
    "elementwise": (swish, elementwise("x*sigmoid(w*x)"), lambda x: x * torch.sigmoid(0.7 * x), (0.7,)),
    "gated": (clip, gated(lambda y, x: x > 0.1), lambda x: x.clamp(min=0.1), ()),
    "linear": (reverse, linear(), lambda x: x.flip(0) * 2, (0,)),
    "bilinear": (outer, bilinear(0, 1), lambda x: x[:, None] * x.exp(), None),
    "constant": (rounded, constant(), lambda x: x.detach().round() + 0 * x, ()),
    "jvp": (cube, from_jvp(cube_push), lambda x: x**3, ()),
    "composite": (softsign, Composite(lambda x: x / (1 + x.abs())), lambda x: x / (1 + x.abs()), ()),
}


@pytest.mark.parametrize("kind", OWN)
def test_own_operator(kind):
    op, rule, same, options = OWN[kind]
    fomoh_fx.register_rule(op, rule)
    assert fomoh_fx.supported_ops()[op.name()] == kind

    def model(x: Tensor) -> Tensor:
        y = x.sin()
        return (op(y, y.exp()) if options is None else op(y, *options)) * x.cos().sum()

    x = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)
    v = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = fomoh_fx.transform(model, wrt="inputs")(x, tangents=[v])
    _, tangents, crosses = reverse_over_reverse(lambda x: same(x.sin()) * x.cos().sum(), [x], [v])
    assert relative_error(out.tangent, tangents) < 1e-12
    assert relative_error(out.hessian(), crosses) < 1e-12


def test_own_rule_replaces_another():
    """Whatever was registered last serves: a rule after a composite, a composite after a rule."""
    op = define("twice(Tensor x)", lambda x: 2 * x)
    fomoh_fx.register_rule(op, Composite(lambda x: x + x))
    assert op in COMPOSITES and op not in RULES
    fomoh_fx.register_rule(op, elementwise("2*x"))
    assert op in RULES and op not in COMPOSITES
    fomoh_fx.register_rule(getattr(torch.ops, MINE).twice, linear())
    assert fomoh_fx.supported_ops()[op.name()] == "linear"


def test_own_function_as_rule():
    """Any function of (op, components, arguments) is a rule."""

    def rule(op, components: Components, x: HyperDual) -> HyperDual:
        return HyperDual(op(x.primal), x.tangent * 5, x.cross)

    op = define("fivefold(Tensor x)", lambda x: 5 * x)
    fomoh_fx.register_rule(op, rule)
    assert fomoh_fx.supported_ops()[op.name()] == "own rule"
    out = fomoh_fx.transform(lambda x: op(x), wrt="inputs")(torch.ones(2), tangents=[torch.ones(1, 2)])
    assert out.tangent.tolist() == [[5.0, 5.0]] and out.cross.tolist() == [[0.0, 0.0]]


@torch.library.custom_op(f"{MINE}::without_backward", mutates_args=())
def without_backward(x: Tensor) -> Tensor:
    return x.sin()


@torch.library.custom_op(f"{MINE}::with_backward", mutates_args=())
def with_backward(x: Tensor) -> Tensor:
    return x.sin()


for custom in (without_backward, with_backward):
    custom.register_fake(torch.empty_like)
with_backward.register_autograd(
    lambda ctx, g: g * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize("op", [unknown, without_backward], ids=["kernel only", "no backward"])
def test_operator_without_rule_is_refused(op):
    hd = fomoh_fx.transform(lambda x: op(x), wrt="inputs")
    with pytest.raises(UnsupportedOpError, match=f"(?s){MINE}.*register_rule"):
        hd(torch.ones(2), tangents=[torch.ones(1, 2)])


def test_operator_with_a_backward_is_served():
    """Its rule is made from the backward: forward mode would pass on nothing."""
    x = torch.tensor([0.3, 1.2], dtype=torch.float64)
    v = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    out = fomoh_fx.transform(lambda x: with_backward(x), wrt="inputs")(x, tangents=[v])
    torch.testing.assert_close(out.tangent, x.cos() * v)
    torch.testing.assert_close(out.cross, -x.sin() * v**2)


def test_operator_with_a_backward_of_a_parameter():
    """Its operator is recorded, not the autograd Function by which torch.library calls the backward."""

    class Sine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([0.3, 1.2], dtype=torch.float64))

        def forward(self) -> Tensor:
            return with_backward(self.w * 2)

    hd = fomoh_fx.transform(Sine())
    v = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    out = hd(tangents={"w": v})
    angle = 2 * hd.module.w.detach()
    torch.testing.assert_close(out.tangent, 2 * angle.cos() * v)
    torch.testing.assert_close(out.cross, -4 * angle.sin() * v**2)
    assert hd.stages["capture"].graph.find_nodes(op="call_function", target=with_backward._opoverload)


# Misuse.


@pytest.mark.parametrize(
    "op", ["aten::tanh", torch.tanh, None, 3, ["aten::tanh"]], ids=["string", "function", "None", "number", "list"]
)
def test_not_an_operator(op):
    with pytest.raises(ArgumentError, match="^op: "):
        fomoh_fx.register_rule(op, linear())


@pytest.mark.parametrize("op", [aten.add_.Tensor, aten.add.out], ids=str)
def test_operator_that_changes_its_arguments(op):
    with pytest.raises(ArgumentError, match="^op: .*changes its arguments"):
        fomoh_fx.register_rule(op, linear())


@pytest.mark.parametrize("rule", ["x*2", None, 3], ids=repr)
def test_not_a_rule(rule):
    with pytest.raises(ArgumentError, match="^rule: "):
        fomoh_fx.register_rule(cube, rule)


def test_composite_of_no_function():
    with pytest.raises(ArgumentError, match="^body: "):
        Composite("x*2")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["x*z"], {}, "expression: .* has z, "),
        (["swoosh(x)"], {}, r"expression: .* has swoosh\(x\), "),
        (["x*"], {}, "expression: .* is not an expression"),
        (["x**2"], {"first": "2*q"}, "first: .* has q, "),
        (["x**2"], {"first": "2*x", "second": "dq"}, "second: .* has dq, "),
    ],
)
def test_expression_with_unknown_names(arguments, options, message):
    with pytest.raises(ArgumentError, match=message):
        elementwise(*arguments, **options)


def test_active_argument_that_the_expression_leaves_out():
    """Its derivative is not zero but unknown."""
    op = define("second(Tensor x, Tensor w)", lambda x, w: x * w)
    fomoh_fx.register_rule(op, elementwise("x"))
    x = HyperDual(torch.ones(2), torch.ones(1, 2))
    with pytest.raises(UnsupportedOpError, match="'w'"):
        RULES[op](op, Components(1, None), torch.ones(2), x)
