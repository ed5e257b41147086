"""Inside the bodies of branches and loops: stops, custom Functions, carries of every kind, dropout."""

import pytest
import torch
from torch import nn
from torch._higher_order_ops import scan
from torch._higher_order_ops.map import map as higher_order_map
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.functional import dropout

import fomoh_fx
from tests.oracle import relative_error, reverse_over_reverse
from tests.rules.test_control_flow import check, r


def ones():
    return torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize("stop", ["no_grad", "detach"])
def test_stops_in_a_scan(stop):
    def stopped(c):
        if stop == "detach":
            return c.sum().detach()
        with torch.no_grad():
            return c.sum()

    def function(x, w):
        return scan(lambda c, row: (torch.tanh(c * stopped(c) @ w + row), c * 1.0), ones(), x)

    def plain(x, w):
        c, ys = ones(), []
        for row in x:
            ys.append(c * 1.0)
            c = torch.tanh(c * c.sum().detach() @ w + row)
        return c, torch.stack(ys)

    check(function, plain, (r(5, 3), r(3, 3)))


def test_stops_in_a_branch():
    def branch(x, w):
        with torch.no_grad():
            s, v = x.sum(), torch.max(x, 0)[0]
        return torch.tanh(x * s * v @ w)

    def function(x, w):
        return torch.cond(x.sum() < 100, branch, lambda x, w: x.cos() @ w, (x, w))

    check(function, lambda x, w: torch.tanh(x * x.sum().detach() * x.max(0)[0].detach() @ w), (r(5, 3), r(3, 3)))


def test_stops_in_a_loop():
    def body(i, c, w):
        with torch.no_grad():
            s = c.sum()
        return i + 1, torch.tanh(c * s @ w), w.clone()

    def function(x, w):
        return while_loop(lambda i, c, w: i < 3, body, (torch.tensor(0), x, w))[1]

    def plain(x, w):
        for _ in range(3):
            x = torch.tanh(x * x.sum().detach() @ w)
        return x

    check(function, plain, (r(5, 3), r(3, 3)))


class Doubled(torch.autograd.Function):
    """The identity, whose gradient is twice as large as it should be."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def doubled(x):
    return 2 * x - x.detach()


def test_a_custom_function_in_a_branch():
    def function(x):
        return torch.cond(x.sum() < 100, lambda x: Doubled.apply(x.sin()).cos(), lambda x: x * 2, (x,))

    check(function, lambda x: doubled(x.sin()).cos(), (r(5, 3),))


def test_whole_numbers_are_carried():
    def function(x, w):
        return while_loop(lambda i, c: i < 3, lambda i, c: (i + 1, torch.tanh(c @ w) * i), (1, x))[1]

    def plain(x, w):
        for i in (1, 2):
            x = torch.tanh(x @ w) * i
        return x

    check(function, plain, (r(5, 3), r(3, 3)))


def test_carried_values_change_places():
    def function(x, w):
        start = (torch.tensor(0), x, w)
        return while_loop(lambda i, a, b: i < 3, lambda i, a, b: (i + 1, b.clone(), a.sin()), start)[1:]

    def plain(a, b):
        for _ in range(3):
            a, b = b, a.sin()
        return a, b

    check(function, plain, (r(3, 3), r(3, 3) + 1))


class Cell(nn.Module):
    """A branch inside a scan, both with parameters."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def forward(self, x):
        def step(c, row):
            branches = (lambda c, row: torch.tanh(self.a(c)) + row, lambda c, row: self.b(c) * row)
            new = torch.cond(row.sum() > 0, *branches, (c, row))
            return new, new * 2

        c, ys = scan(step, ones(), x)
        return ys.sum() + c.sin().sum()


def test_parameters_of_a_branch_in_a_scan():
    model, x = Cell(), r(5, 3)
    names = [name for name, _ in model.named_parameters()]
    v = {name: torch.randn(2, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    out = fomoh_fx.transform(model)(x, tangents=v)

    def plain(*parameters):
        p, c, ys = dict(zip(names, parameters, strict=True)), ones(), []
        for row in x:
            a, b = p["a.weight"] @ c + p["a.bias"], p["b.weight"] @ c + p["b.bias"]
            c = torch.tanh(a) + row if row.sum() > 0 else b * row
            ys.append(c * 2)
        return torch.stack(ys).sum() + c.sin().sum()

    value, slopes, crosses = reverse_over_reverse(plain, [p.detach() for p in model.parameters()], [*v.values()])
    for found, truth in ((out.primal, value), (out.tangent, slopes), (out.hessian(), crosses)):
        assert relative_error(found, truth) < 1e-10


def _scanned(x):
    def step(c, row):
        c = dropout(torch.tanh(c + row), 0.5)
        return c, c * 2

    return scan(step, torch.ones(4, dtype=x.dtype), x)[1]


def _scanned_plain(x):
    c, ys = torch.ones(4, dtype=x.dtype), []
    for row in x:
        c = dropout(torch.tanh(c + row), 0.5)
        ys.append(c * 2)
    return torch.stack(ys)


def _looped(x):
    start = (torch.tensor(0), x)
    return while_loop(lambda i, c: i < 3, lambda i, c: (i + 1, dropout(torch.tanh(c), 0.5) + c), start)[1]


def _looped_plain(x):
    for _ in range(3):
        x = dropout(torch.tanh(x), 0.5) + x
    return x


DROPOUT = {
    "branch": (
        lambda x: torch.cond(x.sum() > -100, lambda x: dropout(x.sin(), 0.5), lambda x: x.cos(), (x,)),
        lambda x: dropout(x.sin(), 0.5),
    ),
    "scan": (_scanned, _scanned_plain),
    "loop": (_looped, _looped_plain),
    "map": (
        lambda x: higher_order_map(lambda row: dropout(torch.tanh(row), 0.5) * row, x),
        lambda x: torch.stack([dropout(torch.tanh(row), 0.5) * row for row in x]),
    ),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_draws_what_plain_python_draws(name):
    function, plain = DROPOUT[name]
    x, v = r(5, 4), torch.randn(2, 5, 4, dtype=torch.float64)
    hd = fomoh_fx.transform(function, wrt="inputs")
    hd.trace(x, tangents=(v,))
    torch.manual_seed(5)
    out = hd(x, tangents=(v,))

    def seeded(x):
        torch.manual_seed(5)
        return plain(x)

    value, slopes, crosses = reverse_over_reverse(seeded, [x], [v])
    for found, truth in ((out.primal, value), (out.tangent, slopes), (out.hessian(), crosses)):
        assert relative_error(found, truth) < 1e-10
