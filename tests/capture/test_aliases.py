"""Tensors that share memory with another one and not its derivative, and are changed in place: both have the value."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import fomoh_fx
from fomoh_fx.capture import frontends
from fomoh_fx.errors import CaptureError, UnsupportedOpError
from tests.oracle import relative_error, reverse_over_reverse

X = torch.rand(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
NO_GRAD = torch.no_grad()


def assert_as_eager(function, x=X):
    """Two inputs by one ``hd``: value, tangents and crosses."""
    hd = fomoh_fx.transform(function, wrt="inputs")
    for value in (x, x.cos()):
        directions = [torch.randn(2, *x.shape, dtype=x.dtype)]
        out = hd(value, tangents=directions)
        expected = reverse_over_reverse(function, [value], directions)
        for actual, truth in zip((out.primal, out.tangent, out.hessian()), expected, strict=True):
            assert relative_error(actual, truth) < 1e-12


class Changing(nn.Module):
    """Changes a parameter and a buffer, and then uses them."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.weight = nn.Parameter(X.sin())
        self.register_buffer("kept", X.cos())

    def forward(self, x):
        self.change(self.weight, self.kept, x * self.weight)
        return ((self.weight @ x) ** 3).sum() + (self.kept * self.weight**2).sum()


CHANGES = {
    "data[0]": lambda w, b, y: w.data[0].mul_(2),
    "data.view": lambda w, b, y: w.data.view(-1).mul_(2),
    "data.T": lambda w, b, y: w.data.T[0].mul_(2),
    "data[:, 0]": lambda w, b, y: w.data[:, 0].zero_(),
    "data.chunk": lambda w, b, y: w.data.chunk(2)[0].zero_(),
    "rows of data": lambda w, b, y: [row.div_(row.norm()) for row in w.data],
    "data.data": lambda w, b, y: w.data.data.mul_(2),
    "data of a buffer": lambda w, b, y: b.data[1].copy_(y.detach()[0]),
    "detach()[0]": lambda w, b, y: b.detach()[0].mul_(2),
    "view.detach()": lambda w, b, y: w[0].detach()[1:].mul_(2),
    "transposed": lambda w, b, y: w.t().data[0].mul_(2),
    "two": lambda w, b, y: (w.detach().mul_(2), b.copy_(w.detach())),
    "out=": lambda w, b, y: torch.mul(w.data, 2, out=w.data),
    "out= a row": lambda w, b, y: torch.mul(w.data[0], 2, out=w.data[0]),
    "foreach": lambda w, b, y: torch._foreach_mul_(list(w.data), 2.0),
    "foreach, one twice": lambda w, b, y: torch._foreach_mul_([w.data, w.data[0]], 2.0),
    "constructor": lambda w, b, y: torch.DoubleTensor(w.data).mul_(2),
    "init": lambda w, b, y: nn.init.constant_(w.data[0], 2.0),
}
UNDER_NO_GRAD = {
    "row": lambda w, b, y: b[0].copy_(y[0]),
    "slice": lambda w, b, y: b[:2].copy_(y[:2]),
    "narrow": lambda w, b, y: b.narrow(0, 0, 2).copy_(y[:2]),
    "view": lambda w, b, y: b.view(-1).add_(1),
    "T": lambda w, b, y: b.T[0].add_(1),
    "chunk": lambda w, b, y: [part.add_(1) for part in b.chunk(3)],
    "rows": lambda w, b, y: [row.copy_(other) for row, other in zip(b, y, strict=True)],
    "diagonal": lambda w, b, y: b.diagonal().zero_(),
    "index_copy_": lambda w, b, y: b[:2].index_copy_(0, torch.tensor([1]), y[:1]),
    "scatter_": lambda w, b, y: b[:2].scatter_(0, torch.zeros(1, 3, dtype=torch.long), y[:1]),
    "out=": lambda w, b, y: torch.mul(y[0], 2, out=b[0]),
    "parameter": lambda w, b, y: w[0].mul_(2),
    "parameter.detach()": lambda w, b, y: w.detach()[0].mul_(2),
}


@pytest.mark.parametrize("frontend", list(frontends.FRONTENDS))
def test_one_change(frontend, monkeypatch):
    monkeypatch.setattr(frontends, "FRONTENDS", {frontend: frontends.FRONTENDS[frontend]})
    assert_model_as_eager(CHANGES["data[0]"])
    assert_model_as_eager(lambda *given: NO_GRAD(UNDER_NO_GRAD["row"])(*given))


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_through_an_alias(name):
    assert_model_as_eager(CHANGES[name])


@pytest.mark.parametrize("name", UNDER_NO_GRAD)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_through_a_view(name, mode):
    assert_model_as_eager(lambda *given: mode()(UNDER_NO_GRAD[name])(*given))


def assert_model_as_eager(change):
    """Value, derivatives and state over two calls of one ``hd``."""
    model = Changing(change)
    reference = copy.deepcopy(model)
    hd = fomoh_fx.transform(model)
    v = torch.randn(2, 3, 3, dtype=torch.float64)
    for _ in range(2):
        out = hd(X, tangents={"weight": v})
        value = reference(X)
        (gradient,) = torch.autograd.grad(value, reference.weight, create_graph=True)
        slopes = (gradient * v).sum((1, 2))
        curvature = [torch.autograd.grad(slope, reference.weight, retain_graph=True)[0] for slope in slopes]
        hessian = (torch.stack(curvature)[:, None] * v).sum((2, 3))
        torch.testing.assert_close((out.primal, out.tangent, out.hessian()), (value.data, slopes.data, hessian))
        torch.testing.assert_close(model.state_dict(), reference.state_dict())


def a_mask(x):
    y = x * 2
    with torch.no_grad():
        mask = torch.zeros_like(y)
        mask[:2].fill_(1)
        mask.diagonal().mul_(3)
    return (y.sin() * mask).sum()


def rows_of_what_has_a_derivative(x):
    y = x * 2
    with torch.no_grad():
        for part in y.split(1):
            part.sub_(part.mean())
        first, second, _ = y.unbind(1)
        second.copy_(first)
    return (y**2 * x).sum()


def detached_before(x):
    y = x * 1
    kept, data = y.detach(), y.data[0]
    with torch.no_grad():
        view = y.T
        y.mul_(3)
        y = y + view.T
    return (x * kept * y).sum() + (data * x).sum()


def changed_after(x):
    y = x * 1
    kept, part = y.detach(), y[1:].detach()
    y[1] = x[0]
    y.mul_(x)
    return (x * kept).sum() + (x[1:] * part * y[1:]).sum()


def aliases_of_aliases(x):
    y = x * 2
    one, other = y.detach(), y.data
    inner = one[1:].detach()
    inner.mul_(3)
    column = other[:, 0]
    column.add_(1)
    return (y**2 * one).sum() + (inner * x[1:]).sum() + (other * x**2).sum() + column.sum() * x.sum()


def an_alias_with_a_derivative_of_its_own(x):
    y = x * 2
    kept = y.detach()
    kept.mul_(x)
    return (y**2 * kept).sum()


def only_a_view_of_the_alias_is_left(x):
    y = x * 2
    row = y.detach()[0]
    whole = y.data
    del y
    row.mul_(3)
    return (whole * x * row).sum()


def in_place_by_name(x):
    y, z = x * 2, x * 3
    with torch.no_grad():
        functional.relu(y - 1, inplace=True)
        functional.relu(y[:2], inplace=True)
        torch.mul(x, 3, out=z)
    return (y**2 * z).sum()


def what_is_given_back_is_itself(x):
    y = x * x
    with torch.no_grad():
        same, contiguous, dropped = y.to(y.dtype), y.contiguous(), functional.dropout(y, 0.5, training=False)
    return (same * contiguous * dropped * x).sum()


def properties_under_no_grad(x):
    y = x * x
    with torch.no_grad():
        turned, real = y.mT, torch.complex(y, x).real
    return (turned.mT * real * x).sum()


def parts_of_complex_numbers(x):
    y = torch.complex(x, x * 2)
    with torch.no_grad():
        y.real.mul_(2)
        torch.view_as_real(y)[0].add_(1)
    return (y.abs() ** 2 * x).sum()


def under_vmap(x):
    def function(row):
        y = row * 2
        y.detach()[0].mul_(3)
        with torch.no_grad():
            y[1:].mul_(3)
        return (y**2 * row).sum()

    return torch.vmap(function)(x).sum()


def statistics(x):
    mean, variance = x.new_zeros(3), x.new_ones(3)
    kept, part = mean.detach(), variance[:2].detach()
    y = functional.batch_norm(x, mean, variance.data, training=True)
    return (y**3 * variance).sum() + (kept * x).sum() + (part * x[:, :2]).sum()


def whole_numbers(x):
    index = torch.tensor([0, 1, 2])
    index.detach()[0] = 2
    with torch.no_grad():
        index[1:].fill_(0)
    return (x[index] ** 2 * torch.arange(3.0)[:, None]).sum()


def what_leaves_the_memory(x):
    y = x * 2
    row, kept = y[0].detach(), y.detach()
    other = kept.detach()
    kept.data = x.exp()
    kept.mul_(2)
    row = row.sin()
    return (y * kept * other).sum() + (row * x).sum()


FUNCTIONS = [
    a_mask, rows_of_what_has_a_derivative, detached_before, changed_after, aliases_of_aliases,
    an_alias_with_a_derivative_of_its_own, only_a_view_of_the_alias_is_left, in_place_by_name,
    what_is_given_back_is_itself, properties_under_no_grad, parts_of_complex_numbers, under_vmap, statistics,
    whole_numbers, what_leaves_the_memory,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_and_derivatives(function):
    assert_as_eager(function)


def test_a_queue_of_keys():
    """As in momentum contrast: what a call enqueues, the next one reads."""

    class Queue(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(X.clone())
            self.register_buffer("queue", torch.ones(6, 3, dtype=torch.float64))

        def forward(self, x):
            query = x @ self.weight
            out = (query @ self.queue.clone().T).logsumexp(1).sum()
            with torch.no_grad():
                self.queue[: x.shape[0]].copy_(query)
            return out

    model = Queue()
    reference = copy.deepcopy(model)
    hd = fomoh_fx.transform(model)
    for _ in range(3):
        value = hd(X, tangents={"weight": X[None]}).primal
        torch.testing.assert_close(value, reference(X).data)
        torch.testing.assert_close(model.queue, reference.queue)


def branches_on_a_row(x):
    limits = torch.tensor([1.0, 2.0], dtype=x.dtype)
    with torch.no_grad():
        limits[0].copy_(x[0, 0])
    return x.sum() if limits[0] > 0 else x.prod()


def branches_on_a_part(x):
    limits = torch.tensor([1.0, 2.0], dtype=x.dtype)
    limits.detach()[:1].copy_(x[0, :1].detach())
    return x.sum() if limits[0] > 0 else x.prod()


@pytest.mark.parametrize("function", [branches_on_a_row, branches_on_a_part])
def test_what_is_written_through_a_view_is_no_constant(function):
    with pytest.raises(CaptureError, match="data-dependent"):
        fomoh_fx.transform(function, wrt="inputs")(X, tangents=(X[None],))


def turns_the_alias(x):
    y = x * 2
    kept = y.detach()
    kept.t_()
    return (y * kept).sum()


def turns_the_source(x):
    y = x * 2
    kept = y.detach()
    y.t_()
    return (y * kept).sum()


def has_elements_several_times(x):
    y = x * 2
    y.unfold(0, 2, 1).detach()[0].mul_(2)
    return y.sum()


def shares_what_was_left(x):
    y = x * 2
    one, other = y.detach(), y.detach()
    y.data = x.cos()
    one.mul_(2)
    return (y * one * other).sum()


def lies_otherwise(x):
    y = x * 2
    y.data = y.data.t()
    return (y * y.stride(0)).sum()


REFUSED = {
    turns_the_alias: "changes the shape or strides .* compute a new tensor instead",
    turns_the_source: "changes the shape or strides .* compute a new tensor instead",
    has_elements_several_times: "has some elements several times",
    shares_what_was_left: r"assign a copy \(y.clone\(\)\)",
    lies_otherwise: r"strides \(3, 1\) a tensor with strides \(1, 3\)[\s\S]*make a new tensor instead",
}


@pytest.mark.parametrize("function", REFUSED)
def test_what_cannot_be_followed_is_refused(function):
    with pytest.raises(UnsupportedOpError, match=rf"{REFUSED[function]}[\s\S]*test_aliases.py"):
        fomoh_fx.transform(function, wrt="inputs")(X, tangents=(X[None],))
