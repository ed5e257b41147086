"""Transformed functions inside a model that is transformed, and inside transforms of torch.func."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import fomoh_fx
from fomoh_fx.errors import ArgumentError, CaptureError

D = torch.float64


def potential(x):
    return (x.sin() * x.roll(1)).sum() + x.pow(4).sum()


def r(*shape):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(sum(shape)))


def trace_of_hessian(function):
    return lambda x: hessian(function)(x).diagonal().sum()


class Residual(nn.Module):
    """The loss of a network that is to solve an equation: its Laplacian is a part of it."""

    def __init__(self, is_warm, is_compiled):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        hd = fomoh_fx.transform(self.net, wrt="inputs", second_order="trace", first_order=False)
        self.__dict__["hd"] = fomoh_fx.compile(hd) if is_compiled else hd
        if is_warm:
            self(r(5, 2))

    def forward(self, x):
        units = torch.eye(2, dtype=x.dtype)[:, None].expand(2, len(x), 2)
        laplacian = self.hd(x, tangents=(units,)).cross
        return (laplacian.squeeze(-1) - x.sin().sum(-1)).square().mean() + self.net(x).square().mean()


@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_laplacian_in_a_loss(is_warm, is_compiled):
    model, x = Residual(is_warm, is_compiled), r(5, 2)
    tangents = {name: r(2, *p.shape) for name, p in model.named_parameters()}
    out = fomoh_fx.transform(model)(x, tangents=tangents)

    def loss(parameters):
        def net(x):
            return functional_call(model.net, parameters, (x,)).squeeze(-1)

        laplacian = vmap(trace_of_hessian(net))(x)
        return (laplacian - x.sin().sum(-1)).square().mean() + net(x).square().mean()

    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.net.named_parameters()}
    value = loss(leaves)
    gradients = torch.autograd.grad(value, [*leaves.values()], create_graph=True)
    torch.testing.assert_close(out.primal, value.detach())
    for i in range(2):
        slope = sum((g * tangents[f"net.{name}"][i]).sum() for g, name in zip(gradients, leaves, strict=True))
        torch.testing.assert_close(out.tangent[i], slope.detach())
        second = torch.autograd.grad(slope, [*leaves.values()], retain_graph=True)
        for j in range(2):
            value = sum((h * tangents[f"net.{name}"][j]).sum() for h, name in zip(second, leaves, strict=True))
            torch.testing.assert_close(out.hessian()[i, j], value)


def test_a_network_that_solves_an_equation_is_trained():
    model, x = Residual(False, False), r(16, 2)
    optimizer = fomoh_fx.optim.FoMoHKD(fomoh_fx.transform(model), lr=1.0, directions=8, seed=0)
    losses = [float(optimizer.step(x)) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("is_warm", [False, True])
def test_one_in_the_other(is_warm):
    x, laplacian = r(3), fomoh_fx.laplacian(potential)
    if is_warm:
        laplacian(x)
    torch.testing.assert_close(fomoh_fx.laplacian(laplacian)(x), trace_of_hessian(trace_of_hessian(potential))(x))
    torch.testing.assert_close(fomoh_fx.grad(laplacian)(x), grad(trace_of_hessian(potential))(x))
    slopes = fomoh_fx.grad(lambda x: fomoh_fx.grad(potential)(x).pow(2).sum())
    torch.testing.assert_close(slopes(x), grad(lambda x: grad(potential)(x).pow(2).sum())(x))


def test_three_in_functions_that_make_them():
    """The third derivative, as it is written in an equation's residual."""
    first = lambda x: fomoh_fx.grad(torch.sin)(x)  # noqa: E731
    second = lambda x: fomoh_fx.grad(first)(x)  # noqa: E731
    x = torch.tensor(0.7, dtype=D)
    torch.testing.assert_close(fomoh_fx.grad(second)(x), -x.cos())


def test_beside_transforms_of_torch_inside():
    x = r(4, 3)

    def total(laplacian):
        return lambda x: vmap(laplacian)(x).pow(2).sum() + grad(lambda x: laplacian(x[0]) * x[1].sum())(x).sum()

    expected = grad(total(trace_of_hessian(potential)))(x)
    torch.testing.assert_close(fomoh_fx.grad(total(fomoh_fx.laplacian(potential)))(x), expected)


@pytest.mark.parametrize("is_warm", [False, True])
def test_under_vmap(is_warm):
    x, laplacian, matrix = r(5, 3), fomoh_fx.laplacian(potential), fomoh_fx.hessian(potential)
    if is_warm:
        laplacian(x[0]), matrix(x[0])
    torch.testing.assert_close(vmap(laplacian)(x), vmap(trace_of_hessian(potential))(x))
    torch.testing.assert_close(vmap(matrix)(x), vmap(hessian(potential))(x))
    torch.testing.assert_close(laplacian(x[1]), trace_of_hessian(potential)(x[1]))  # and outside again


@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("outer", [grad, jacfwd, lambda f: lambda x: jvp(f, (x,), (x,)), lambda f: vmap(grad(f))])
def test_derivatives_of_torch_are_refused(outer, is_warm):
    x, laplacian = r(3, 3), fomoh_fx.laplacian(potential)
    if is_warm:
        laplacian(x), laplacian(x[0])
    with pytest.raises(ArgumentError, match="inside torch.func.grad, jvp or the like"):
        outer(laplacian)(x)
    if is_warm:
        torch.testing.assert_close(laplacian(x[0]), trace_of_hessian(potential)(x[0]))


def test_what_values_of_an_argument_decide_is_refused_inside():
    inner = fomoh_fx.transform(lambda x, n: x.pow(2 if n.sum() > 1 else 3).sum(), wrt="inputs")

    def model(x, n):
        return inner(x, n, tangents=(torch.ones(1, 3, dtype=D), None)).tangent.sum()

    with pytest.raises(CaptureError, match="values of an argument decide"):
        fomoh_fx.transform(model, wrt="inputs")(r(3), torch.tensor([0, 1]), tangents=(r(1, 3), None))


@pytest.mark.parametrize("outer", ["grad", "hessian", "hessian_diagonal", "laplacian"])
@pytest.mark.parametrize("inner", ["grad", "hessian", "hessian_diagonal", "laplacian"])
def test_an_operator_that_the_model_makes_at_every_call(inner, outer):
    """In an order in which what one leaves behind would reach the next."""
    x = r(3)
    theirs = {
        "grad": grad,
        "hessian": lambda f: jacrev(jacrev(f)),
        "hessian_diagonal": lambda f: lambda x: jacrev(jacrev(f))(x).diagonal(),
        "laplacian": lambda f: lambda x: jacrev(jacrev(f))(x).diagonal().sum(),
    }

    def total(operators, name):
        return lambda y: operators[name](potential)(y).square().sum()

    ours = {name: getattr(fomoh_fx, name) for name in theirs}
    torch.testing.assert_close(ours[outer](total(ours, inner))(x), theirs[outer](total(theirs, inner))(x))


def test_a_plane_is_asked_for_inside():
    """Its matrix is made of numbers that no other capture may find changed."""
    x = r(3)

    def inside(y):
        return fomoh_fx.transform(potential, wrt="inputs")(y, tangents=(torch.eye(3, dtype=y.dtype),)).hessian()

    torch.testing.assert_close(
        fomoh_fx.grad(lambda y: inside(y).sin().sum())(x), grad(lambda y: jacrev(jacrev(potential))(y).sin().sum())(x)
    )
    torch.testing.assert_close(fomoh_fx.hessian(potential)(x), jacrev(jacrev(potential))(x))
