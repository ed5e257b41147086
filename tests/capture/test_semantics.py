"""What tracing loses and capture keeps: custom Functions, detach, no_grad, tensors held by a closure."""

import contextlib

import pytest
import torch
from torch import nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.autograd.function import once_differentiable

import fomoh_fx
from fomoh_fx.capture import frontends
from fomoh_fx.errors import CaptureError, UnsupportedOpError
from tests.oracle import finite_differences, relative_error, reverse_over_reverse


@pytest.fixture
def x():
    return torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1


def assert_like_reverse_mode(f, *xs, reference=None):
    directions = [torch.randn(3, *x.shape, dtype=x.dtype) for x in xs]
    out = fomoh_fx.transform(f, wrt="inputs")(*xs, tangents=directions)
    y, tangents, crosses = reverse_over_reverse(reference or f, xs, directions)
    for actual, expected in ((out.primal, y), (out.tangent, tangents), (out.hessian(), crosses)):
        assert relative_error(actual, expected) < 1e-12


def function(forward, backward):
    """A custom Function of tensors that saves its inputs."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        def backward(ctx, g):
            return backward(g, *ctx.saved_tensors)

    return Custom.apply


class Sine(torch.autograd.Function):
    """With a derivative twice the true one, so that inlining the forward would show."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x.cos()


class Several(torch.autograd.Function):
    """Several outputs, one of them without derivative; an argument that is no tensor; the newer calling style."""

    @staticmethod
    def forward(x, factor):
        return x * factor, x.exp(), x > 0.5

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx, a, b, _):
        return a * ctx.factor + b * ctx.saved_tensors[0], None


def test_the_backward_of_a_function_is_its_derivative(x):
    assert_like_reverse_mode(lambda x: Sine.apply(x * x).sum(1), x)


def test_straight_through_estimator(x):
    straight_through = function(lambda x: x.round(), lambda g, x: g)
    assert_like_reverse_mode(lambda x: (straight_through(x * x) * x).sum(1), x)


def test_gradient_reversal(x):
    reverse = function(lambda x: x.clone(), lambda g, x: -g)
    assert_like_reverse_mode(lambda x: reverse(x * x).sum(1), x)


def test_an_argument_without_gradient(x):
    half = function(lambda x, y: x * y, lambda g, x, y: (g * y, None))
    assert_like_reverse_mode(lambda x: half(x, x * x).sum(1), x)
    nothing = function(lambda x: 2 * x, lambda g, x: None)
    assert_like_reverse_mode(lambda x: (nothing(x) * x).sum(1), x)


def test_several_outputs(x):
    def f(x):
        a, b, positive = Several.apply(x, 3.0)
        return (a * b * positive).sum(1)

    assert_like_reverse_mode(f, x)


def test_indexing_by_scalars_under_vmap_is_no_custom_function(x):
    """As masks of attention are made: PyTorch does it by a Function of its own."""

    def products(x):
        rows, columns = torch.arange(4), torch.arange(5)
        with TransformGetItemToIndex():
            return torch.vmap(lambda i: torch.vmap(lambda j: x[i, j] * x[0, j])(columns))(rows).square().sum()

    assert_like_reverse_mode(products, x, reference=lambda x: (x * x[0]).square().sum())


def test_a_function_under_vmap_is_refused(x):
    class Squared(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x**2

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            return 3 * g * ctx.saved_tensors[0]

    with pytest.raises(UnsupportedOpError, match="Squared is called under torch.vmap"):
        fomoh_fx.transform(lambda x: torch.vmap(Squared.apply)(x).sum(), wrt="inputs")(x, tangents=(x[None],))


def test_checkpoint_changes_memory_not_derivatives(x):
    def f(x, reentrant):
        return torch.utils.checkpoint.checkpoint(lambda x: (x.sin() * x).sum(1), x, use_reentrant=reentrant)

    for reentrant in (True, False):
        assert_like_reverse_mode(lambda x, r=reentrant: f(x, r), x, reference=lambda x: (x.sin() * x).sum(1))


def selected():
    return torch.utils.checkpoint.create_selective_checkpoint_contexts([torch.ops.aten.tanh.default])


def scaled():
    """Contexts of a user's that change nothing."""
    return contextlib.nullcontext(), contextlib.nullcontext()


@pytest.mark.parametrize("options", [{}, {"context_fn": selected}, {"context_fn": scaled}], ids=["all", "some", "own"])
def test_derivatives_inside_a_model_of_a_checkpoint(x, options):
    """Backward runs the function again, on values that are detached."""

    def residual(x, run):
        with torch.enable_grad():
            x = x.clone() if x.requires_grad else x.detach().requires_grad_()
            u = run(lambda x: (x.sin() * x).tanh(), x).square().sum()
            return torch.autograd.grad(u, x, create_graph=True)[0].square().sum(1)

    def checkpointed(function, x):
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False, **options)

    assert_like_reverse_mode(
        lambda x: residual(x, checkpointed), x, reference=lambda x: residual(x, lambda function, x: function(x))
    )


@pytest.mark.parametrize(
    ("backward", "reason"),
    [
        (lambda g, x: g.clamp(-1, 1), "not linear in the incoming gradient"),
        (lambda g, x: g / g.norm(), "not linear in the incoming gradient"),
        (lambda g, x: torch.ones_like(x), "cannot be differentiated in the incoming gradient"),
        (once_differentiable(lambda ctx, g: g), "cannot be transposed"),
    ],
    ids=["clip", "normalise", "constant", "once"],
)
def test_a_backward_that_is_no_transposed_derivative_is_refused(x, backward, reason):
    custom = function(lambda x: x.clone(), backward)
    with pytest.raises(fomoh_fx.UnsupportedOpError, match=r"(?s)Function Custom .*test_semantics.py") as error:
        fomoh_fx.transform(lambda x: custom(x).sum(1), wrt="inputs")(x, tangents=(torch.ones(1, 4, 5).double(),))
    assert reason in str(error.value)


def test_a_function_that_leaves_torch_is_refused(x):
    leave = function(lambda x: torch.from_numpy(x.numpy() * 2), lambda g, x: 2 * g)
    with pytest.raises(fomoh_fx.CaptureError, match=r"test_semantics.py:\d+, leave = function"):
        fomoh_fx.transform(lambda x: leave(x), wrt="inputs")(x, tangents=(torch.ones(1, 4, 5).double(),))


@pytest.mark.parametrize(
    "stop", [lambda y: y.detach(), lambda y: y.data, torch.detach], ids=["method", "data", "function"]
)
def test_detach_stops_derivatives(x, stop):
    assert_like_reverse_mode(lambda x: (stop(x * x) * x).sum(1), x, reference=lambda x: ((x * x).detach() * x).sum(1))


def test_no_grad_stops_derivatives(x):
    def f(x):
        y = x * x
        with torch.no_grad():
            z = (2 * y).exp()
        return (y * z).sum(1)

    assert_like_reverse_mode(f, x)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gradient_inside_the_model_is_differentiated_where_its_graph_is_created(x, create_graph):
    def f(x):
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad((x.sin() * x).sum(), x, create_graph=create_graph)
        return ((x - 0.1 * slope) ** 3).sum(1)

    assert_like_reverse_mode(f, x)


def test_grad_mode_of_the_caller_does_not_matter(x):
    directions = (torch.randn(2, 4, 5, dtype=torch.float64),)
    expected = fomoh_fx.transform(lambda x: x.sin().sum(1), wrt="inputs")(x, tangents=directions)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            out = fomoh_fx.transform(lambda x: x.sin().sum(1), wrt="inputs")(x, tangents=directions)
        torch.testing.assert_close(out.cross, expected.cross)


def test_in_place_under_no_grad_changes_the_value_only(x):
    def f(x):
        y = (x * x).exp()
        with torch.no_grad():
            y.mul_(2)
        return (y * x).sum(1)

    def reference(x):
        y = (x * x).exp()
        return ((y + y.detach()) * x).sum(1)

    assert_like_reverse_mode(f, x, reference=reference)


def test_detach_in_place(x):
    def f(x):
        y = x * x
        y.detach_()
        return (y * x).sum(1)

    assert_like_reverse_mode(f, x, reference=lambda x: ((x * x).detach() * x).sum(1))


def test_tensors_of_a_closure_are_read_at_every_call(x):
    net = nn.Linear(5, 3).double()
    scale = torch.ones(3, dtype=torch.float64)

    def f(x):
        return (net(x) * scale).tanh().sum(1)

    hd = fomoh_fx.transform(f, wrt="inputs")
    directions = (torch.randn(1, 4, 5, dtype=torch.float64),)
    hd(x, tangents=directions)
    with torch.no_grad():
        net.weight.mul_(2)
        scale.mul_(3)
    torch.testing.assert_close(hd(x, tangents=directions).primal, f(x).detach())
    assert_like_reverse_mode(f, x)


def test_in_place_on_a_detached_tensor_changes_the_value_of_its_source(x):
    def f(x):
        y = x * 2
        y.data.mul_(3)
        y.detach()[0] = 1.0
        z = y.detach()
        z += 1
        return y.sin().sum() + (z * x).sum()

    def reference(x):
        y = x * 2
        value = (y * 3).detach().index_fill(0, torch.tensor(0), 1.0) + 1
        y = y + (value - y).detach()
        return y.sin().sum() + (value * x).sum()

    assert_like_reverse_mode(f, x, reference=reference)


def test_assigned_data_change_the_value_and_keep_the_derivative(x):
    def f(x):
        y = x * 2
        y.data = x.cos()
        y.data.clamp_(max=0.9)
        return (y * x.exp()).sum()

    def reference(x):
        y = x * 2
        y = y + (x.cos().clamp(max=0.9) - y).detach()
        return (y * x.exp()).sum()

    assert_like_reverse_mode(f, x, reference=reference)


def test_assigned_data_of_a_parameter_and_a_buffer_last():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(5, dtype=torch.float64))
            self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))

        def forward(self, x):
            self.mean.data = 0.5 * self.mean.data + x.mean(0)
            self.shift.data = -self.mean
            return (x + self.shift).square().sum()

    model, reference, x = Centred(), Centred(), torch.rand(4, 5, dtype=torch.float64)
    hd = fomoh_fx.transform(model)
    for _ in range(3):
        out = hd(x, tangents={"shift": torch.ones(1, 5, dtype=torch.float64)})
        value = reference(x)
        (slope,) = torch.autograd.grad(value, reference.shift)
        torch.testing.assert_close((out.primal, out.tangent[0]), (value.detach(), slope.sum()))
        torch.testing.assert_close(model.state_dict(), reference.state_dict())


@pytest.mark.parametrize("at", [0, 1])
def test_assigned_data_share_no_memory_in_a_graph(x, at):
    def f(x):
        pair = [x * 2, x.cos()]
        pair[0].data = pair[1]
        pair[at].mul_(2)
        return (pair[0] * pair[1]).sum()

    with pytest.raises(UnsupportedOpError, match=r"assign a copy"):
        fomoh_fx.transform(f, wrt="inputs")(x, tangents=(torch.randn(1, 4, 5, dtype=torch.float64),))


def _fills_the_value(y, x):
    value = x.cos()
    y.data = value
    torch.sin(x, out=value)
    return y


def _clips_the_value(y, x):
    value = -x.cos()
    y.data = value
    nn.functional.relu(value, inplace=True)
    return y


def _uses_a_view_from_before(y, x):
    view = y[:2]
    y.data = x.cos()
    return view


def _returns_a_view_from_before(y, x):
    view = next(iter(y))
    y.data = x.cos()
    return view


def _changes_a_view_from_before(y, x):
    view = y[:2]
    y.data = x.cos()
    view.fill_(1.0)
    return y


def _assigns_to_a_view(y, x):
    view = y[:2]
    view.data = x.cos()[:2]
    return y


SHARED = [
    _fills_the_value, _clips_the_value, _uses_a_view_from_before, _returns_a_view_from_before,
    _changes_a_view_from_before, _assigns_to_a_view,
]  # fmt: skip


@pytest.mark.parametrize("frontend", list(frontends.FRONTENDS))
@pytest.mark.parametrize("body", SHARED)
def test_memory_that_assigned_data_leave_or_share_is_refused(x, body, frontend, monkeypatch):
    monkeypatch.setattr(frontends, "FRONTENDS", {frontend: frontends.FRONTENDS[frontend]})
    with pytest.raises(UnsupportedOpError, match=r"assigns"):
        fomoh_fx.transform(lambda x: body(x * 2, x), wrt="inputs")(x, tangents=(torch.ones_like(x)[None],))


@pytest.mark.parametrize("frontend", list(frontends.FRONTENDS))
def test_assigned_data_leave_the_memory_to_what_was_detached_before(x, frontend, monkeypatch):
    monkeypatch.setattr(frontends, "FRONTENDS", {frontend: frontends.FRONTENDS[frontend]})

    def f(x):
        one, other = x * 2, x.cos()
        first, before = one.data, one.detach()
        one.data, other.data = other.data, first
        one.data = one.detach().clone() + 1
        one.mul_(x)
        before = before + one[:, :2].sum()
        return (one * x).sum() + (other * before).sum()

    def reference(x):
        one = x * 2 + (x.cos() + 1 - x * 2).detach()
        one = one * x
        other = x.cos() + (x * 2 - x.cos()).detach()
        return (one * x).sum() + (other * ((x * 2).detach() + one[:, :2].sum())).sum()

    assert_like_reverse_mode(f, x, reference=reference)


@pytest.mark.parametrize("frontend", list(frontends.FRONTENDS))
def test_a_change_in_place_of_heads_that_are_a_view(x, frontend, monkeypatch):
    """What it becomes is laid out otherwise, so that the tensor behind it is no view of that."""
    monkeypatch.setattr(frontends, "FRONTENDS", {frontend: frontends.FRONTENDS[frontend]})
    mask = torch.tensor([True, False, True, True])

    def f(x):
        y = torch.cat([x, x.sin()], 1)
        heads = y.view(1, 4, 2, 5).permute(0, 2, 1, 3)
        heads.masked_fill_(mask.view(1, 1, 4, 1), 0.5)
        return (y.view(4, 10).exp() * x.repeat(1, 2)).sum() + heads.square().sum()

    assert_like_reverse_mode(f, x)


@pytest.mark.parametrize("bags", [False, True])
def test_an_embedding_with_max_norm_renormalises_the_value_of_its_weight(x, bags):
    indices = torch.tensor([[0, 1], [1, 0]])
    embed = nn.functional.embedding_bag if bags else nn.functional.embedding

    def f(weight):
        return embed(indices, weight * 2, max_norm=0.7).sin().sum()

    def reference(weight):
        weight = weight * 2
        value = weight.detach().clone()
        torch.embedding_renorm_(value, indices, 0.7, 2.0)
        rows = (weight + (value - weight).detach())[indices]
        return (rows.mean(1) if bags else rows).sin().sum()

    assert_like_reverse_mode(f, x, reference=reference)


def test_a_new_tensor_from_a_size_has_that_shape(x):
    x = x[:2, :2]
    weights = torch.rand(2, 2, dtype=x.dtype, generator=torch.Generator().manual_seed(0))

    def f(x):
        return (x.sin() * x.new(x.shape).copy_(weights)).sum()

    assert_like_reverse_mode(f, x, reference=lambda x: (x.sin() * weights).sum())


def test_an_input_with_a_tangent_requires_a_gradient(x):
    """Models ask for it to spare a straight-through estimator; what is in it may still be changed in place."""

    def quantised(x):
        x[0] = x[1] * 2
        rounded = (x * 3).round() / 3
        return ((x + (rounded - x).detach()) if x.requires_grad else rounded).sin().square().sum()

    assert_like_reverse_mode(quantised, x, reference=lambda x: quantised(x.clone()))
    plain = fomoh_fx.transform(lambda x, y: (x * 2 if x.requires_grad else x) * y, wrt="inputs")
    out = plain(x, x.cos(), tangents=(None, torch.ones(1, 4, 5, dtype=x.dtype)))
    torch.testing.assert_close(out.primal, x * x.cos())


def test_input_that_is_told_to_require_a_gradient():
    def energy(x):
        x.requires_grad = True
        return torch.autograd.grad(x.pow(4).sum(), x, create_graph=True)[0]

    x, v = torch.randn(3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(fomoh_fx.transform(energy, wrt="inputs")(x, tangents=[v]).tangent, 12 * x.square() * v)


@pytest.mark.parametrize("x", [torch.randn(2, 6)[:, ::2], torch.randn(3).expand(2, 3)])
def test_strides_of_an_input_with_a_tangent(x):
    hd = fomoh_fx.transform(lambda x: x.sin() * (1 + x.stride(0)), wrt="inputs")
    torch.testing.assert_close(hd(x, tangents=[torch.ones(1, 2, 3)]).primal, x.sin() * (1 + x.stride(0)))


def weighted(x, y):
    return nn.functional.cross_entropy(x, torch.arange(4), weight=y[0])


def given_a_place(x, y):
    z = torch.empty(4, 5, dtype=x.dtype)
    torch.mul(x, y, out=z)
    return z.sin().sum()


def rows_changed_in_place(x, y):
    z = x * y
    for row in z.unbind():
        row.mul_(row.sin())
    return z.sum()


def with_statistics_of_its_own(x, y):
    normal = nn.functional.batch_norm(x, y[0].clone(), y[1].clone(), training=True)
    return (normal * y).sum()


BEYOND = [weighted, given_a_place, rows_changed_in_place, with_statistics_of_its_own]


@pytest.mark.parametrize("f", BEYOND, ids=lambda f: f.__name__)
def test_what_autograd_refuses(f, x):
    """Not differentiable in reverse mode, for want of a backward; forward there is nothing against it."""
    xs = (x, x.flip(0).exp())
    directions = [torch.randn(2, *x.shape, dtype=x.dtype) for x in xs]
    out = fomoh_fx.transform(f, wrt="inputs")(*xs, tangents=directions)
    for actual, expected in zip(
        (out.primal, out.tangent, out.hessian()), finite_differences(f, xs, directions), strict=True
    ):
        assert relative_error(actual, expected) < 1e-5


def test_what_autograd_refuses_of_a_model_that_asks_for_a_gradient(x):
    """Its answer is not to be had: with gradients autograd refuses the rest, without them the answer is wrong."""
    hd = fomoh_fx.transform(lambda x, y: weighted(x, y) * (2 if x.requires_grad else 1), wrt="inputs")
    with pytest.raises(CaptureError, match="not differentiable with respect to argument 'weight'"):
        hd(x, x.exp(), tangents=(torch.ones(1, 4, 5, dtype=x.dtype),) * 2)
