"""Operators of one's own: custom autograd Functions, torch.library operators, Triton kernels."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

import fomoh_fx
from fomoh_fx.errors import ArgumentError, UnsupportedOpError
from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.rules.kinds import Composite, bilinear, constant, elementwise, from_jvp, gated, linear
from tests.oracle import finite_differences, relative_error, reverse_over_reverse

X = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
V = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def agree(model: Any, same: Any = None, truth: Any = reverse_over_reverse, compiled: bool = False) -> Any:
    """Compare a model of one tensor with the truth about another that computes the same."""
    hd = fomoh_fx.transform(model, wrt="inputs")
    hd = fomoh_fx.compile(hd) if compiled else hd
    out = hd(X, tangents=[V])
    expected = truth(same or model, [X], [V])
    tolerance = 1e-6 if truth is finite_differences else 1e-12
    for actual, true in zip((out.primal, out.tangent, out.hessian()), expected, strict=True):
        assert relative_error(actual, true) < tolerance
    return hd


def refusal(model: Any, error: type[Exception] = UnsupportedOpError) -> str:
    with pytest.raises(error) as caught:
        fomoh_fx.transform(model, wrt="inputs")(X, tangents=[V])
    assert "test_custom_operators.py:" in str(caught.value), caught.value
    return str(caught.value)


def opaque(forward: Callable[..., Any], old: bool = True) -> type[Function]:
    """A Function without a backward, in the style with a context or in the newer one."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    if old:
        return type("Opaque", (Function,), {"forward": staticmethod(lambda ctx, *args: forward(*args))})
    methods = {"forward": staticmethod(forward), "setup_context": staticmethod(setup_context)}
    return type("Opaque", (Function,), methods)


# --- Functions with a rule


class Swish(Function):
    """Whose backward is useless, so that it cannot have been used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float = 1.0) -> Tensor:
        return x * torch.sigmoid(beta * x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        raise RuntimeError("not called")


class SwishOfTheNewerStyle(Function):
    @staticmethod
    def forward(x: Tensor, beta: float = 1.0) -> Tensor:
        return x * torch.sigmoid(beta * x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...


@pytest.mark.parametrize("function", [Swish, SwishOfTheNewerStyle])
@pytest.mark.parametrize("beta", [(), (0.7,)], ids=["default", "given"])
def test_elementwise_rule_of_a_function(function: Any, beta: tuple[float, ...]) -> None:
    fomoh_fx.register_rule(function, elementwise("x*sigmoid(w*x)"))
    assert fomoh_fx.supported_ops()[function.__name__] == "elementwise"
    factor = beta[0] if beta else 1.0

    def same(x: Tensor) -> Tensor:
        return (x.sin() * torch.sigmoid(factor * x.sin())).sum(1)

    hd = agree(lambda x: function.apply(x.sin(), *beta).sum(1), same)
    assert hd.report().served[function.__name__] == ("elementwise", 1)
    assert f"torch.ops.fomoh_fx_functions.{function.__name__}.default([sin], " in hd.code


def _halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return x.flip(dim) * 2, x.sum(dim)


KINDS: dict[str, tuple[Any, Any, Callable[[Any, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gated": (
        lambda x: x.clamp(min=0.5), gated(lambda y, x: y > 0.5),
        lambda f, x: f(x).sum(1), lambda x: x.clamp(min=0.5).sum(1),
    ),
    "linear": (
        _halves, linear(),
        lambda f, x: (f(x, 0)[0] * f(x, 0)[1]).sum(1), lambda x: (x.flip(0) * 2 * x.sum(0)).sum(1),
    ),
    "bilinear": (
        lambda x, w: x[..., None] * w[..., None, :], bilinear(0, 1),
        lambda f, x: f(x, x.sin()).sum((1, 2)), lambda x: x.sum(1) * x.sin().sum(1),
    ),
    "constant": (
        lambda x: x.round(), constant(),
        lambda f, x: (f(x) * x).sum(1), lambda x: (x.detach().round() * x).sum(1),
    ),
    "jvp": (
        lambda x: x**3, from_jvp(lambda op, active, tangents, x: 3 * x**2 * tangents[0]),
        lambda f, x: f(x).sum(1), lambda x: (x**3).sum(1),
    ),
    "composite": (
        lambda x: x / (1 + x.abs()), Composite(lambda x: x / (1 + x.abs())),
        lambda f, x: f(x).sum(1), lambda x: (x / (1 + x.abs())).sum(1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("old", [True, False], ids=["with context", "newer style"])
@pytest.mark.parametrize("kind", KINDS)
def test_rule_of_a_function(kind: str, old: bool) -> None:
    forward, rule, model, same = KINDS[kind]
    function = opaque(forward, old)
    fomoh_fx.register_rule(function, rule)
    agree(lambda x: model(function.apply, x.sin()), lambda x: same(x.sin()))


def test_function_as_rule_of_a_function() -> None:
    """It sees the arguments of apply, and an operator that is called as apply is."""
    seen = []

    def rule(op: Any, components: Components, x: HyperDual, factor: float, name: str) -> Any:
        seen.append((str(op), factor, name))
        scaled = HyperDual(op(x.primal, factor, name)[0], x.tangent * factor, x.cross * factor)
        return scaled, None, x.primal > 0.5

    class Scale(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, factor: float, name: str) -> Any:
            return x * factor, None, x > 0.5

    fomoh_fx.register_rule(Scale, rule)

    def model(x: Tensor) -> Tensor:
        y, nothing, mask = Scale.apply(x * x, 3.0, "thrice")
        assert nothing is None
        return (y * mask * x).sum(1)

    hd = agree(model, lambda x: (3 * x * x * (x * x > 0.5) * x).sum(1))
    assert seen and seen[0][1:] == (3.0, "thrice") and seen[0][0].endswith("Scale")
    assert hd.report().served["Scale"] == ("own rule", 1)


def test_composite_of_a_function_that_draws() -> None:
    """One mask serves the value and its derivatives."""

    class Drop(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            mask = torch.rand_like(x)
            ctx.save_for_backward(mask)
            return x * mask

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * ctx.saved_tensors[0]

    message = refusal(lambda x: Drop.apply(x * x))
    assert message.startswith("operator Drop: ") and "draws random numbers" in message
    assert "fomoh_fx.register_rule(Drop, rule)" in message
    fomoh_fx.register_rule(Drop, Composite(lambda x: x * torch.rand_like(x)))
    out = fomoh_fx.transform(lambda x: Drop.apply(x), wrt="inputs")(X, tangents=[V])
    torch.testing.assert_close(out.tangent, out.primal / X * V)


def test_dropout_in_evaluation_draws_nothing_in_a_function() -> None:
    class Sine(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.nn.functional.dropout(x.sin(), 0.1, training=False)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * ctx.saved_tensors[0].cos()

    agree(lambda x: Sine.apply(x * x).sum(1), lambda x: (x * x).sin().sum(1))


def test_two_functions_of_one_name() -> None:
    double, triple = opaque(lambda x: 2 * x), opaque(lambda x: 3 * x)
    fomoh_fx.register_rule(double, elementwise("2*x"))
    fomoh_fx.register_rule(triple, elementwise("3*x"))
    agree(lambda x: (double.apply(x) * triple.apply(x)).sum(1), lambda x: 6 * (x * x).sum(1))


def test_inactive_function_needs_no_rule() -> None:
    agree(lambda x: (opaque(torch.sin).apply(x.detach()) * x).sum(1), lambda x: (x.detach().sin() * x).sum(1))


@pytest.mark.parametrize("rule", [3, None, "x"])
def test_no_rule_of_a_function(rule: Any) -> None:
    with pytest.raises(ArgumentError, match="^rule: "):
        fomoh_fx.register_rule(Swish, rule)


def test_the_base_of_all_functions_has_no_rule() -> None:
    with pytest.raises(ArgumentError, match="^op: "):
        fomoh_fx.register_rule(Function, linear())


def test_wrong_number_of_results() -> None:
    pair = opaque(lambda x: (x * 2, x * 3))
    fomoh_fx.register_rule(pair, lambda op, components, x: op(x.primal)[0])
    assert "operator Opaque: its rule failed with" in refusal(lambda x: pair.apply(x)[0])


# --- Functions by their backward


def saving(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """``apply`` of a Function with (ctx, ..) methods."""
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type("Saving", (Function,), methods).apply


def _save(ctx: Any, *tensors: Any) -> None:
    ctx.save_for_backward(*tensors)


def _saved_output(ctx: Any, x: Tensor) -> Tensor:
    y = x.round() + 0.25
    _save(ctx, y)
    return y


def _saved_attribute(ctx: Any, x: Tensor) -> Tensor:
    ctx.x = x
    return x.sin()


def _saved_input(ctx: Any, x: Tensor) -> Tensor:
    _save(ctx, x)
    return x.sin()


def _without_gradient(ctx: Any, g: Tensor) -> Tensor:
    with torch.no_grad():
        slope = ctx.saved_tensors[0].cos()
    return g * slope


LIKE_REVERSE_MODE = {
    "a saved output has the Function's own derivative": (_saved_output, lambda ctx, g: g * ctx.saved_tensors[0]),
    "an input kept as an attribute": (_saved_attribute, lambda ctx, g: g * ctx.x.cos()),
    "detach in backward": (_saved_input, lambda ctx, g: g * ctx.saved_tensors[0].detach().cos()),
    "no_grad in backward": (_saved_input, _without_gradient),
    "its input": (lambda ctx, x: x, lambda ctx, g: 3 * g),
    "a view of its input": (lambda ctx, x: x.view_as(x), lambda ctx, g: -g),
    "the gradient's shape": (lambda ctx, x: x.clone(), lambda ctx, g: g * g.shape[0]),
}


@pytest.mark.parametrize("name", LIKE_REVERSE_MODE)
def test_backward_of_a_function(name: str) -> None:
    function = saving(*LIKE_REVERSE_MODE[name])
    agree(lambda x: (function(x * x) * x).sum(1))


@pytest.mark.parametrize("keep", ["saved", "attribute"])
def test_what_a_forward_computes_and_keeps_is_differentiated(keep: str) -> None:
    """Reverse mode takes it for a constant and loses the term; the truth is the second derivative of the sine."""

    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = x.cos()
        _save(ctx, ctx.slope)
        return x.sin()

    function = saving(forward, lambda ctx, g: g * (ctx.saved_tensors[0] if keep == "saved" else ctx.slope))
    agree(lambda x: function(x * x).sum(1), lambda x: (x * x).sin().sum(1))
    agree(lambda x: function(x * x).sum(1), truth=finite_differences)


def test_vjp_in_place_of_backward() -> None:
    methods = {"forward": staticmethod(_saved_input), "vjp": staticmethod(lambda ctx, g: 2 * g * ctx.saved_tensors[0])}
    agree(lambda x: type("Vjp", (Function,), methods).apply(x * x).sum(1))


def test_results_that_are_no_tensors() -> None:
    function = saving(
        lambda ctx, x: (_save(ctx, x), (x.sin(), 3, None))[1], lambda ctx, g, *_: g * ctx.saved_tensors[0].cos()
    )

    def model(x: Tensor) -> Tensor:
        y, three, nothing = function(x * x)
        assert nothing is None
        return three * y.sum(1)

    agree(model)


class Surrogate(Function):
    """The gradient of x^2 w is taken for (x w, x^2), which is the gradient of nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * x * w, g * x * x


def with_surrogate(x: Tensor) -> Tensor:
    return (Surrogate.apply(x.sin(), x.cumsum(0)) * x.exp()).sum().square()


def test_of_a_gradient_that_is_none_the_symmetric_part_counts() -> None:
    jacobian = reverse_over_reverse(with_surrogate, [X], [V])[2]
    assert relative_error(jacobian, jacobian.T) > 1e-2

    def symmetrised(*args: Any) -> Any:
        value, slope, curvature = reverse_over_reverse(*args)
        return value, slope, (curvature + curvature.T) / 2

    agree(with_surrogate, truth=symmetrised)
    for second_order, expected in (("diagonal", jacobian.diagonal()), ("trace", jacobian.trace())):
        hd = fomoh_fx.transform(with_surrogate, wrt="inputs", second_order=second_order)
        assert relative_error(hd(X, tangents=[V]).cross, expected) < 1e-12


class Sine(Function):
    """Twice the sine's derivative, so that another derivative shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 5 * tangent


def test_function_in_a_loop_of_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = Sine.apply(layer(x))
            return x.sum(1)

    hd = agree(Net())
    assert hd.report().served["Sine"] == ("its backward", 2)


@pytest.mark.parametrize("rest", [False, True], ids=["alone", "with another term"])
def test_a_model_that_differentiates_a_function_itself(rest: bool) -> None:
    def model(x: Tensor) -> Tensor:
        x = x.clone() if x.requires_grad else x.clone().requires_grad_()
        y = Sine.apply(x * x) + (x**2 if rest else 0)
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0].sum(1)

    agree(model)


class Dirty(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x.mul_(2))
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class Unmarked(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x[0].zero_()
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


@pytest.mark.parametrize("function", [Dirty, Unmarked])
def test_function_that_changes_its_argument(function: Any) -> None:
    """The change would be lost, even in the value."""

    def model(x: Tensor) -> Tensor:
        y = x.sin()
        function.apply(y)
        return y * x

    assert f"Function {function.__name__} changes its arguments in place" in refusal(model)


class OnTheDefaultDevice(Function):
    devices: ClassVar[list[str]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        OnTheDefaultDevice.devices.append(torch.empty(0).device.type)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def test_function_under_a_default_device() -> None:
    hd = fomoh_fx.transform(OnTheDefaultDevice.apply, wrt="inputs")
    with torch.device("meta"):
        out = hd(X, tangents=[V])
    assert torch.equal(out.tangent, 2 * V)
    assert {*OnTheDefaultDevice.devices} == {"meta"}


class Recomputed(Function):
    """As activation checkpoints are written: backward runs a module again, whose parameters are arguments as well."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.inputs = run, (x, *parameters)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, *parameters = ctx.inputs
        with torch.enable_grad():
            y = ctx.run(x.view_as(x))
        return None, *torch.autograd.grad(y, (x, *parameters), g, allow_unused=True, create_graph=True)


class Recomputes(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.how == "plain":
            return self.inner(x).sin().sum()
        run = (lambda x: self.inner(x)) if self.how == "in a function" else self.inner
        return Recomputed.apply(run, x, *self.inner.parameters()).sin().sum()


@pytest.mark.parametrize("how", ["a module", "in a function"])
def test_function_whose_backward_runs_a_module_with_its_arguments(how: str) -> None:
    model, same = Recomputes(how).double(), Recomputes("plain").double()
    names = [name for name, _ in model.named_parameters()]
    hd = fomoh_fx.transform(model)
    generator = torch.Generator().manual_seed(0)
    V = {n: torch.randn(2, *p.shape, dtype=p.dtype, generator=generator) for n, p in model.named_parameters()}

    def truth(*values: Tensor) -> Tensor:
        return torch.func.functional_call(same, dict(zip(names, values, strict=True)), (X,))

    for _ in range(2):
        out = hd(X, tangents=V)
        parameters = [p.detach() for p in model.parameters()]
        for actual, true in zip(
            (out.primal, out.tangent, out.hessian()),
            reverse_over_reverse(truth, parameters, [*V.values()]),
            strict=True,
        ):
            assert relative_error(actual, true) < 1e-12
        with torch.no_grad():
            model.inner[0].weight.mul_(2)


class Nested(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return NestedBackward.apply(g, *ctx.saved_tensors)


class NestedBackward(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return 3 * x * x * g

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        g, x = ctx.saved_tensors
        return h * 3 * x * x, h * 7 * x * g


def test_a_second_derivative_of_its_own_is_not_passed_over() -> None:
    assert "calls another, NestedBackward" in refusal(lambda x: Nested.apply(x).sum())
    out = fomoh_fx.transform(lambda x: Nested.apply(x), wrt="inputs", second_order=None)(X, tangents=[V])
    torch.testing.assert_close(out.tangent, 3 * X * X * V)


def _by_array(ctx: Any, g: Tensor) -> Tensor:
    return g * torch.from_numpy(ctx.saved_tensors[0].numpy())


REFUSED = {
    "once": once_differentiable(lambda ctx, g: g),
    "clips": lambda ctx, g: g.clamp(-1, 1),
    "leaves torch": _by_array,
    "branches on the gradient": lambda ctx, g: g if (g > 0).all() else 2 * g,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_backward(name: str) -> None:
    """The message says how to register a rule, and the rule then serves."""
    methods = {"forward": staticmethod(_saved_input), "backward": staticmethod(REFUSED[name])}
    function = type("Stubborn", (Function,), methods)
    message = refusal(lambda x: function.apply(x))
    assert message.startswith("operator Stubborn: ") and "fomoh_fx.register_rule(Stubborn, rule)" in message
    fomoh_fx.register_rule(function, elementwise("sin(x)"))
    agree(lambda x: function.apply(x * x).sum(1), lambda x: (x * x).sin().sum(1))


# --- operators of torch.library

LIBRARY = "fomoh_fx_test_custom"
library = torch.library.Library(LIBRARY, "FRAGMENT")


@torch.library.custom_op(f"{LIBRARY}::bare", mutates_args=())
def bare(x: Tensor, factor: float = 1.0) -> Tensor:
    return torch.from_numpy((x.numpy() * factor).copy()).sin()


@torch.library.custom_op(f"{LIBRARY}::known", mutates_args=())
def known(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sin(), x.cos()


@torch.library.custom_op(f"{LIBRARY}::once", mutates_args=())
def once(x: Tensor) -> Tensor:
    return x.sin()


@torch.library.custom_op(f"{LIBRARY}::fill", mutates_args=("out",))
def fill(x: Tensor, out: Tensor, factor: float = 1.0) -> None:
    out.copy_(x.sin() * factor)


@torch.library.custom_op(f"{LIBRARY}::noisy", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def noisy(x: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.rand_like(x)
    return x * mask, mask


@torch.library.triton_op(f"{LIBRARY}::kernel", mutates_args=())
def kernel(x: Tensor) -> Tensor:
    return x.sin() * 2


bare.register_fake(lambda x, factor=1.0: torch.empty_like(x))
once.register_fake(torch.empty_like)
for op in (known, noisy):
    op.register_fake(lambda x: (torch.empty_like(x), torch.empty_like(x)))
known.register_autograd(
    lambda ctx, a, b: a * ctx.saved_tensors[1] - b * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*output),
)
once.register_autograd(lambda ctx, g: bare(g), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
noisy.register_autograd(
    lambda ctx, a, b: a * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_operator_with_an_autograd_formula(compiled: bool) -> None:
    """Saved outputs have the operator's own derivative."""

    def model(x: Tensor) -> Tensor:
        sine, cosine = known(x * x)
        return (sine * cosine * x).sum(1)

    hd = agree(model, lambda x: ((x * x).sin() * (x * x).cos() * x).sum(1), compiled=compiled)
    assert hd.report().served[f"{LIBRARY}.known.default"] == ("synthesised", 1)


@pytest.mark.parametrize(
    ("op", "call"),
    [
        (bare, lambda x: bare(x)),
        (once, lambda x: once(x)),
        (kernel, lambda x: kernel(x)),
        (noisy, lambda x: noisy(x)[0]),
        (fill, lambda x: (out := torch.empty_like(x), fill(x, out))[0]),
    ],
    ids=lambda v: getattr(v, "_name", ""),
)
def test_operator_without_exact_derivative(op: Any, call: Any) -> None:
    name = f"{LIBRARY}.{op._name}.default"
    message = refusal(lambda x: call(x * x).sum())
    assert message.startswith(f"operator {name}: no rule, and ") and f"fomoh_fx.register_rule({name}, rule)" in message


def _into_slice(x: Tensor) -> Tensor:
    pair = torch.zeros(2, *x.shape, dtype=x.dtype)
    y = x * 1
    fill(y, pair[0], 2.0)
    torch.ops.fomoh_fx_test_custom.fill(pair[0], y)
    return (pair.sum(0) * x + y).sum(1)


def _without_gradients(x: Tensor) -> Tensor:
    y = x * x
    with torch.no_grad():
        fill(y, y)
    return (y * x).sum(1)


def _same_without_gradients(x: Tensor) -> Tensor:
    y = x * x
    return ((y + (y.sin() - y).detach()) * x).sum(1)


SERVED: dict[str, tuple[Any, Any, Any, Any]] = {
    "functional": (
        bare, elementwise("sin(w*x)"), lambda x: bare(x * x, 0.5).sum(1), lambda x: (x * x / 2).sin().sum(1),
    ),
    "Triton": (kernel, elementwise("2*sin(x)"), lambda x: kernel(x).sum(1), lambda x: 2 * x.sin().sum(1)),
    "changes an argument": (
        fill, elementwise("v*sin(x)"), _into_slice, lambda x: (2 * x.sin() * x + (2 * x.sin()).sin()).sum(1),
    ),
    "changes a detached argument": (
        fill, elementwise("v*sin(x)"),
        lambda x: (y := x * x, fill(x, y.detach()), (y * x).sum(1))[2],
        lambda x: ((x * x + (x.sin() - x * x).detach()) * x).sum(1),
    ),
    "changes an argument under no_grad": (fill, elementwise("v*sin(x)"), _without_gradients, _same_without_gradients),
    "changes an argument, composite": (
        fill, Composite(lambda x, out, factor=1.0: x.sin() * factor), _into_slice,
        lambda x: (2 * x.sin() * x + (2 * x.sin()).sin()).sum(1),
    ),
}  # fmt: skip


@pytest.fixture
def unregistered() -> Any:
    """Rules of these operators last for one test."""
    from fomoh_fx.rules import registry

    tables = (registry.RULES, registry.COMPOSITES, registry.KINDS)
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)  # type: ignore[arg-type]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", SERVED)
def test_operator_with_a_rule(name: str, compiled: bool, unregistered: Any) -> None:
    op, rule, model, same = SERVED[name]
    fomoh_fx.register_rule(getattr(torch.ops.fomoh_fx_test_custom, op._name).default, rule)
    assert f"{LIBRARY}::{op._name}" in fomoh_fx.supported_ops()
    agree(model, same, compiled=compiled)


@pytest.mark.parametrize("spelling", [lambda: fill, lambda: torch.ops.fomoh_fx_test_custom.fill], ids=["op", "packet"])
def test_other_names_of_an_operator(spelling: Any, unregistered: Any) -> None:
    fomoh_fx.register_rule(spelling(), elementwise("v*sin(x)"))
    assert fomoh_fx.supported_ops()[f"{LIBRARY}::fill"] == "elementwise"


def test_a_changed_tensor_of_the_users_own_changes_once(unregistered: Any) -> None:
    fomoh_fx.register_rule(fill, elementwise("v*sin(x)"))
    state = torch.zeros(4, 3, dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        fill(x, state)
        return (state * x).sum(1)

    out = fomoh_fx.transform(model, wrt="inputs")(X, tangents=[V])
    torch.testing.assert_close(out.tangent, ((X.cos() * X + X.sin()) * V).sum(2))
    torch.testing.assert_close(state, X.sin())


def test_a_model_that_differentiates_an_operator_without_derivative() -> None:
    def model(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        out = torch.empty_like(x)
        fill(x, out)
        return torch.autograd.grad((out + x * x).sum(), x, create_graph=True)[0].sum(1)

    assert "differentiates fomoh_fx_test_custom.fill.default itself" in refusal(model)


def test_an_operator_that_draws_is_drawn_once_where_it_is_inactive() -> None:
    out = fomoh_fx.transform(lambda x: noisy(x.detach())[1] * x, wrt="inputs")(X, tangents=[V])
    torch.testing.assert_close(out.tangent, out.primal / X * V)


def _stopping(stop: Callable[[Tensor], Tensor], name: str) -> Any:
    """An operator whose backward stops a derivative."""
    op = torch.library.custom_op(
        f"{LIBRARY}::{name}", lambda x: x.sin(), mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    op.register_fake(torch.empty_like)
    op.register_autograd(
        lambda ctx, g: g * stop(ctx.saved_tensors[0]),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return op


@torch.no_grad()
def _slope(x: Tensor) -> Tensor:
    return x.cos()


@pytest.mark.parametrize("stop", [lambda x: x.detach().cos(), _slope], ids=["detach", "no_grad"])
def test_stops_in_the_backward_of_an_operator(stop: Any, request: Any) -> None:
    op = _stopping(stop, f"stops_{request.node.callspec.id}")
    agree(lambda x: op(x * x).sum(1))


def test_a_function_in_the_backward_of_an_operator_is_not_passed_over() -> None:
    op = _stopping(lambda x: Sine.apply(x), "calls_a_function")
    assert "its backward calls a custom autograd Function, Sine" in refusal(lambda x: op(x * x).sum(1))


# --- Triton kernels


def sine_kernel(x_ptr: Tensor, out_ptr: Tensor, n: int, BLOCK: int) -> None:
    out_ptr.copy_(x_ptr.sin())


class Kernel:
    """What PyTorch asks of a kernel, made from a Python function: Triton itself is not needed."""

    fn = staticmethod(sine_kernel)
    arg_names = ("x_ptr", "out_ptr", "n", "BLOCK")

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return sine_kernel


KERNEL = Kernel()


@pytest.fixture
def launched(monkeypatch: Any, unregistered: Any) -> Callable[[Tensor], Tensor]:
    """A model's function that launches the kernel as ``torch.library.wrap_triton`` does."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation

    monkeypatch.setattr("fomoh_fx.triton_kernels.get_mutated_tensors", lambda **given: ["out_ptr"])

    def function(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        triton_kernel_wrapper_mutation(
            kernel_idx=kernel_side_table.add_kernel(KERNEL),  # type: ignore[arg-type]
            constant_args_idx=kernel_side_table.add_constant_args({}),
            grid=[(1, 1, 1)],
            tma_descriptor_metadata={},
            kwargs={"x_ptr": x, "out_ptr": out, "n": x.numel(), "BLOCK": 16},
        )
        return out

    return function


def test_kernel_without_a_rule(launched: Any) -> None:
    message = refusal(lambda x: launched(x * x).sum())
    assert message.startswith("operator sine_kernel: no rule, ")
    assert "fomoh_fx.register_rule(sine_kernel, rule)" in message


def test_inactive_kernel_needs_no_rule(launched: Any) -> None:
    agree(lambda x: (launched(x.detach()) * x).sum(1), lambda x: (x.detach().sin() * x).sum(1))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "rule", [elementwise("sin(x)"), Composite(lambda x, out, n, block: x.sin())], ids=["elementwise", "composite"]
)
def test_kernel_with_a_rule(launched: Any, rule: Any, compiled: bool) -> None:
    fomoh_fx.register_rule(KERNEL, rule)
    assert "sine_kernel" in fomoh_fx.supported_ops()
    agree(lambda x: launched(x * x).sum(1), lambda x: (x * x).sin().sum(1), compiled=compiled)


def test_kernel_under_no_grad(launched: Any) -> None:
    fomoh_fx.register_rule(KERNEL, elementwise("sin(x)"))

    def model(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = launched(x)
        return (y * x).sum(1)

    agree(model, lambda x: (x.detach().sin() * x).sum(1))


def test_a_model_that_differentiates_a_kernel_itself(launched: Any) -> None:
    def model(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad((launched(x) + x * x).sum(), x, create_graph=True)[0]

    assert "differentiates sine_kernel itself" in refusal(model)


# --- what a call keeps


def test_a_size_that_is_dynamic_is_no_argument_of_a_function() -> None:
    """It would be kept as it was at capture."""
    hd = fomoh_fx.transform(lambda x: SwishOfTheNewerStyle.apply(x, x.shape[0]).sum(), wrt="inputs")
    batch = torch.export.Dim("batch", min=2, max=64)
    with pytest.raises(UnsupportedOpError, match="SwishOfTheNewerStyle depends on a dynamic dimension"):
        hd.trace(X, tangents=[V], dynamic_shapes=({0: batch},))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["its rule", "its backward"])
def test_compiled_function(kind: str) -> None:
    function = Sine
    if kind == "its rule":
        function = opaque(lambda x: x * 2)
        fomoh_fx.register_rule(function, linear())
        agree(lambda x: function.apply(x * x).sum(1), lambda x: 2 * (x * x).sum(1), compiled=True)
    else:
        agree(lambda x: function.apply(x * x).sum(1), compiled=True)


@torch.library.custom_op("fomoh_fx_tests::checked", mutates_args=())
def checked(x: Tensor) -> Tensor:
    return x * x


@checked.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


WRONG = {
    r"a tangent of shape \[4, 3\].*\[2, 4, 3\]": lambda op, c, x: HyperDual(
        op(x.primal), (2 * x.primal * x.tangent).sum(0)
    ),
    r"a cross of shape \[2, 4, 3\].*\[3, 4, 3\]": lambda op, c, x: HyperDual(op(x.primal), x.tangent, x.tangent),
    r"a primal of shape \[\]": lambda op, c, x: op(x.primal).sum(),
    "NoneType": lambda op, c, x: None,
    "tuple": lambda op, c, x: (x, x),
}


@pytest.mark.parametrize("match", WRONG)
def test_a_rule_of_the_wrong_shape_is_named(match):
    fomoh_fx.register_rule(checked, WRONG[match])
    message = refusal(lambda x: checked(x).sum())
    assert "checked" in message
    assert re.search(match, message), message


def test_a_rule_that_is_registered_later_serves_what_was_transformed_before():
    fomoh_fx.register_rule(checked, elementwise("x"))
    hd = fomoh_fx.transform(lambda x: checked(x).sum(), wrt="inputs")
    torch.testing.assert_close(hd(X, tangents=[V]).tangent, V.sum((1, 2)))
    fomoh_fx.register_rule(checked, elementwise("x*x"))
    torch.testing.assert_close(hd(X, tangents=[V]).tangent, (2 * X * V).sum((1, 2)))


@torch.library.custom_op("fomoh_fx_tests::sum_of_two", mutates_args=())
def sum_of_two(x: Tensor, w: Tensor) -> Tensor:
    return x + w


@sum_of_two.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return torch.empty(torch.broadcast_shapes(x.shape, w.shape), dtype=x.dtype)


def test_an_expression_may_broadcast_its_arguments():
    fomoh_fx.register_rule(sum_of_two, elementwise("x+w"))
    row, v = X[0], V[:, 0]
    found = fomoh_fx.transform(lambda w: sum_of_two(X, w).sin().sum(), wrt="inputs")(row, tangents=[v])
    expected = reverse_over_reverse(lambda w: (X + w).sin().sum(), [row], [v])
    for actual, true in zip((found.primal, found.tangent, found.hessian()), expected, strict=True):
        assert relative_error(actual, true) < 1e-12
