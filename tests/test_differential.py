"""The differential operators, against torch.func in reverse mode."""

import pytest
import torch
from torch import nn

import fomoh_fx


def f(x, w):
    return (torch.sin(x @ w) * x.sum()).exp().sum()


@pytest.fixture
def point():
    torch.manual_seed(0)
    return torch.randn(3, dtype=torch.float64) * 0.3, torch.randn(3, 4, dtype=torch.float64) * 0.3


@pytest.mark.parametrize("argnums", [0, 1])
def test_gradient(point, argnums):
    expected = torch.func.grad(f, argnums)(*point)
    torch.testing.assert_close(fomoh_fx.grad(f, argnums)(*point), expected)
    torch.testing.assert_close(fomoh_fx.grad(f, argnums, chunk_size=2)(*point), expected)


@pytest.mark.parametrize("argnums", [0, 1])
def test_hessian(point, argnums):
    expected = torch.func.jacrev(torch.func.jacrev(f, argnums), argnums)(*point)
    torch.testing.assert_close(fomoh_fx.hessian(f, argnums)(*point), expected)


def test_hessian_of_a_vector_function(point):
    def g(x):
        return torch.stack([x.prod(), x.square().sum(), x[0] * x[1].exp()])

    expected = torch.func.jacrev(torch.func.jacrev(g))(point[0])
    torch.testing.assert_close(fomoh_fx.hessian(g)(point[0]), expected)


@pytest.mark.parametrize("scale", [1.0, 1e6, 0.0])
def test_hessian_vector_product(point, scale):
    v = torch.randn_like(point[1]) * scale
    hessian = torch.func.jacrev(torch.func.jacrev(f, 1), 1)(*point)
    expected = torch.einsum("ijkl,kl->ij", hessian, v)
    torch.testing.assert_close(fomoh_fx.hvp(f, 1)(*point, v), expected)
    torch.testing.assert_close(fomoh_fx.hvp(f, 1, chunk_size=5)(*point, v), expected)


def test_quadratic_form(point):
    v = torch.randn_like(point[0])
    hessian = torch.func.jacrev(torch.func.jacrev(f))(*point)
    torch.testing.assert_close(fomoh_fx.quadratic_form(f)(*point, v), v @ hessian @ v)


def test_diagonal_and_laplacian_of_a_network(point):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    hessian = torch.func.jacrev(torch.func.jacrev(net))(point[0])
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(fomoh_fx.hessian_diagonal(net)(point[0]), diagonal.detach())
    torch.testing.assert_close(fomoh_fx.laplacian(net)(point[0]), diagonal.sum(-1).detach())
    torch.testing.assert_close(fomoh_fx.laplacian(net, chunk_size=2)(point[0]), diagonal.sum(-1).detach())


def test_a_pytree_argument(point):
    def g(parameters):
        return (parameters["x"] * parameters["y"].sum()).exp().sum()

    tree = {"x": point[0], "y": point[1]}
    expected = torch.func.grad(g)(tree)
    torch.testing.assert_close(fomoh_fx.grad(g)(tree), expected)


def test_a_number_as_argument():
    x = torch.tensor(2.0, dtype=torch.float64)
    for transform, expected in (("grad", 12), ("hessian", 12), ("hessian_diagonal", 12), ("laplacian", 12)):
        torch.testing.assert_close(getattr(fomoh_fx, transform)(lambda x: x**3)(x), torch.full_like(x, expected))
    torch.testing.assert_close(fomoh_fx.hvp(lambda x: x**3)(x, x), torch.full_like(x, 24))
    tree = {"x": torch.ones(3, dtype=torch.float64), "scale": x}

    def scaled(tree):
        return tree["x"].square().sum() * tree["scale"].exp()

    torch.testing.assert_close(fomoh_fx.grad(scaled)(tree), torch.func.grad(scaled)(tree))
    torch.testing.assert_close(fomoh_fx.hessian(scaled)(tree), torch.func.hessian(scaled)(tree))


def test_misuse_names_the_argument(point):
    with pytest.raises(fomoh_fx.ArgumentError, match="^f: grad needs .* scalar"):
        fomoh_fx.grad(lambda x: x)(point[0])
    with pytest.raises(fomoh_fx.ArgumentError, match="^argnums"):
        fomoh_fx.grad(f, 2)(*point)
    with pytest.raises(fomoh_fx.ArgumentError, match="^argnums"):
        fomoh_fx.laplacian(lambda x: x * 1.0)(torch.arange(3))
    with pytest.raises(fomoh_fx.ArgumentError, match="^v"):
        fomoh_fx.hvp(f)(*point, torch.randn(2))
    with pytest.raises(fomoh_fx.ArgumentError, match="^f"):
        fomoh_fx.hessian(3)


def test_chunks_that_would_draw_anew_are_refused(point):
    """One mask, and one update of the statistics, serve all directions."""
    x, _ = point
    norm = nn.BatchNorm1d(3).double()
    functions = [
        lambda x: nn.functional.dropout(x**2, 0.5, training=True).sum(),
        lambda x: norm(torch.stack([x, x**2])).sin().sum(),
    ]
    for function in functions:
        for operator in (fomoh_fx.grad, fomoh_fx.laplacian, fomoh_fx.hessian_diagonal):
            with pytest.raises(fomoh_fx.ArgumentError, match="^chunk_size: "):
                operator(function, chunk_size=2)(x)
            operator(function, chunk_size=3)(x)
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("size", [1e-24, 1e20, 0.0])
def test_hvp_of_a_vector_whose_squares_are_out_of_range(size):
    x, v = torch.ones(6), torch.full((6,), size)
    torch.testing.assert_close(fomoh_fx.hvp(lambda x: (x**3).sum())(x, v), 6 * v, rtol=1e-5, atol=0)


def g(p, x, scale=1.0):
    return torch.tanh(p["weight"] @ x + p["bias"]).square() * scale


@pytest.fixture
def several():
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3), (2,), (3,)))
    return {"weight": weight, "bias": bias}, x


@pytest.mark.parametrize("argnums", [0, (0, 1), (1,)])
def test_hessian_in_several_tensors(several, argnums):
    expected = torch.func.jacrev(torch.func.jacrev(g, argnums), argnums)(*several)
    torch.testing.assert_close(fomoh_fx.hessian(g, argnums)(*several), expected)


def test_several_arguments(several):
    def scalar(p, x):
        return g(p, x).sum()

    expected = torch.func.grad(scalar, (1, 0))(*several)
    torch.testing.assert_close(fomoh_fx.grad(scalar, (1, 0))(*several), expected)
    torch.testing.assert_close(fomoh_fx.grad(scalar, (-1, 0), chunk_size=4)(*several), expected)
    matrix = torch.func.hessian(lambda flat: scalar(
        {"weight": flat[:6].reshape(2, 3), "bias": flat[6:8]}, flat[8:]
    ))(torch.cat([several[0]["weight"].flatten(), several[0]["bias"], several[1]]))  # fmt: skip
    product = fomoh_fx.hvp(scalar, (0, 1))(*several, several)
    flat = torch.cat([several[0]["weight"].flatten(), several[0]["bias"], several[1]])
    torch.testing.assert_close(
        torch.cat([product[0]["weight"].flatten(), product[0]["bias"], product[1]]), matrix @ flat
    )
    torch.testing.assert_close(fomoh_fx.quadratic_form(scalar, (0, 1))(*several, several), flat @ matrix @ flat)
    torch.testing.assert_close(fomoh_fx.laplacian(scalar, (0, 1))(*several), matrix.trace())
    torch.testing.assert_close(fomoh_fx.hessian_diagonal(scalar, (0, 1))(*several)[1], matrix.diagonal()[8:])


def test_keyword_arguments(several):
    expected = torch.func.jacrev(torch.func.jacrev(lambda x: g(several[0], x, 3.0)))(several[1])
    torch.testing.assert_close(fomoh_fx.hessian(g, 1)(*several, scale=3.0), expected)
    torch.testing.assert_close(fomoh_fx.laplacian(g, 1)(*several, scale=3.0), expected.diagonal(dim1=1, dim2=2).sum(1))


def test_no_numbers():
    x = torch.zeros(0, 2, dtype=torch.float64)

    def scalar(x):
        return x.sin().sum()

    assert fomoh_fx.grad(scalar)(x).shape == (0, 2)
    assert fomoh_fx.hessian(scalar)(x).shape == (0, 2, 0, 2)
    assert fomoh_fx.hessian_diagonal(scalar, chunk_size=3)(x).shape == (0, 2)
    assert fomoh_fx.hvp(scalar)(x, x).shape == (0, 2)
    assert fomoh_fx.laplacian(scalar)(x) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fomoh_fx.grad(f, "x")(x, x), "argnums: expected the number"),
        (lambda x: fomoh_fx.grad(f, (0, -2))(x, x), "argnums: .* twice"),
        (lambda x: fomoh_fx.grad(f, (0, 2))(x, x), "argnums: 2 is out of range"),
        (lambda x: fomoh_fx.grad(f, chunk_size=0)(x, x), "chunk_size: must be at least 1"),
        (lambda x: fomoh_fx.hvp(f)(), "v: missing"),
        (lambda x: fomoh_fx.hvp(f)(x), "v: missing"),
        (lambda x: fomoh_fx.hessian(f)({}, x), "argnums: hessian needs a tensor"),
    ],
)
def test_arguments_that_do_not_fit(point, call, message):
    with pytest.raises(fomoh_fx.ArgumentError, match=message):
        call(point[0])
