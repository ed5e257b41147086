"""Known defects of PyTorch that this package works around: each test fails once PyTorch has repaired the defect.

Nested ``torch.func.jvp`` is what a user would compute second directional derivatives with. Where the assertion that it
is wrong fails, PyTorch has changed: then see which text, oracle or rule can go.
"""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fomoh_fx
from tests.oracle import finite_differences, relative_error, reverse_over_reverse

Function = Callable[[Tensor], Tensor]


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _product_by_scatter(x: Tensor) -> Tensor:
    return torch.full((3,), 1.5, dtype=x.dtype).scatter_reduce(0, torch.tensor([0, 0, 1, 2]), x, "prod")


#: Functions whose second directional derivative by nested forward mode is wrong, without an error.
WRONG: dict[str, tuple[Function, Tensor]] = {
    "layer_norm": (lambda x: F.layer_norm(x, (3,)), _normal(4, 3)),
    "batch_norm in train mode": (lambda x: F.batch_norm(x, None, None, training=True), _normal(5, 3)),
    "instance_norm": (F.instance_norm, _normal(2, 3, 4)),
    "solve": (lambda x: torch.linalg.solve(x, x[0]), _normal(3, 3)),
    "solve_ex": (lambda x: torch.linalg.solve_ex(x, x[0])[0], _normal(3, 3)),
    "tensorsolve": (lambda x: torch.linalg.tensorsolve(x, x[..., 0].square()), _normal(2, 3, 6)),
    "det": (torch.linalg.det, _normal(3, 3)),
    "logdet": (lambda x: torch.logdet(x @ x.mT), _normal(3, 3)),
    "slogdet": (lambda x: torch.linalg.slogdet(x)[1], _normal(3, 3)),
    "householder_product": (lambda x: torch.linalg.householder_product(x, x[0]), _normal(3, 2)),
    "cumprod at zeros": (lambda x: x.cumprod(0), torch.tensor([1.0, 0.0, 2.0, 0.0, 3.0], dtype=torch.float64)),
    "scatter_reduce prod": (_product_by_scatter, _normal(4)),
}

#: Functions whose derivatives, by forward and by reverse mode, are zero without an error.
SILENTLY_ZERO = [
    "airy_ai", "bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1", "modified_bessel_i0", "modified_bessel_i1",
    "modified_bessel_k0", "modified_bessel_k1", "scaled_modified_bessel_k0", "scaled_modified_bessel_k1",
    "spherical_bessel_j0",
]  # fmt: skip


def _weighted(function: Function) -> Function:
    """A number that sees every element of the function's value."""

    def scalar(x: Tensor) -> Tensor:
        y = function(x).reshape(-1)
        return (y * torch.linspace(0.5, 1.5, len(y), dtype=y.dtype)).sum()

    return scalar


def _nested(function: Function, x: Tensor, v: Tensor) -> Tensor:
    """v^T H v by nested forward mode."""
    return torch.func.jvp(lambda x: torch.func.jvp(function, (x,), (v,))[1], (x,), (v,))[1]


def _ours(function: Function, x: Tensor, v: Tensor) -> fomoh_fx.HyperDual:
    return fomoh_fx.transform(function, wrt="inputs")(x, tangents=(v.unsqueeze(0),))


@pytest.mark.parametrize("name", WRONG)
def test_nested_forward_mode_is_still_wrong(name: str) -> None:
    function, x = _weighted(WRONG[name][0]), WRONG[name][1]
    v = torch.cos(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)
    _, _, truth = reverse_over_reverse(function, [x], [v.unsqueeze(0)])
    _, _, difference = finite_differences(function, [x], [v.unsqueeze(0)])
    assert relative_error(difference, truth) < 1e-5
    assert relative_error(_nested(function, x, v), truth.squeeze()) > 1e-3, f"PyTorch has repaired {name}"
    assert relative_error(_ours(function, x, v).cross[0], truth.squeeze()) < 1e-8


@pytest.mark.parametrize("name", SILENTLY_ZERO)
def test_special_functions_are_still_silently_constant(name: str) -> None:
    function, x = _weighted(getattr(torch.special, name)), torch.tensor([0.7, 1.9], dtype=torch.float64)
    v = torch.ones_like(x)
    _, slope, curvature = finite_differences(function, [x], [v.unsqueeze(0)])
    assert slope.abs().item() > 1e-3 and curvature.abs().item() > 1e-3
    value, tangent = torch.func.jvp(function, (x,), (v,))
    assert tangent.item() == 0, f"PyTorch has given special.{name} a derivative"
    assert not function(x.clone().requires_grad_()).requires_grad
    if name == "airy_ai":  # its derivative is no function of PyTorch's
        with pytest.raises(fomoh_fx.UnsupportedOpError, match="special_airy_ai"):
            _ours(function, x, v)
        return
    out = _ours(function, x, v)
    assert relative_error(out.primal, value) < 1e-12
    assert relative_error(out.tangent, slope) < 1e-5 and relative_error(out.cross, curvature[0]) < 1e-5


@pytest.mark.parametrize("name", ["bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1"])
def test_bessel_functions_are_still_single_precision_in_the_middle(name: str) -> None:
    """Rational functions in them lack a leading coefficient; derivatives in terms of them have no more digits."""
    function = mpmath.besselj if name[-2] == "j" else mpmath.bessely
    points = torch.tensor([5.01, 30.0], dtype=torch.float64)
    values = getattr(torch.special, name)(points).tolist()
    errors = [abs(y - float(function(int(name[-1]), x))) for x, y in zip(points.tolist(), values, strict=True)]
    assert errors[1] < 1e-14
    assert 1e-8 < errors[0] < 1e-6, f"PyTorch has repaired special.{name}"


def test_flash_attention_on_a_cpu_still_has_no_forward_mode() -> None:
    q = _normal(1, 2, 5, 4)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda x: F.scaled_dot_product_attention(x, x, x), (q,), (q,))


def test_reverse_mode_of_batch_norm_is_still_wrong_for_one_sample_in_an_odd_layout() -> None:
    """In eval mode, where the gradient is laid out channels last: reverse mode is no oracle there."""
    norm, x = nn.BatchNorm2d(4).double().eval(), _normal(1, 4, 3, 3).requires_grad_()
    gradient = _normal(3, 3, 4).as_strided((1, 4, 3, 3), (7, 1, 12, 4))  # one sample: its stride is arbitrary
    (found,) = torch.autograd.grad(norm(x), x, gradient)
    assert relative_error(found, gradient / (1 + norm.eps) ** 0.5) > 1e-3, "PyTorch has repaired it"


def test_reverse_mode_of_weight_norm_is_still_wrong_at_second_order() -> None:
    """Its backward takes the norm that it has saved for a constant, as in weight_norm(dim=0) of every layer."""
    direction, scale, weights = _normal(3, 2), torch.ones(3, 1, dtype=torch.float64), _normal(3, 2)

    def function(v: Tensor) -> Tensor:
        return (torch._weight_norm(v, scale, 0).sin() * weights).sum()

    v = _normal(2, 3, 2)[1:]
    _, _, by_reverse_mode = reverse_over_reverse(function, (direction,), (v,))
    h = 1e-4
    values = [function(direction + step * h * v[0]) for step in (1, 0, -1)]
    expected = (values[0] - 2 * values[1] + values[2]) / h**2
    out = fomoh_fx.transform(function, wrt="inputs")(direction, tangents=(v,))
    torch.testing.assert_close(out.cross[0], expected, rtol=1e-5, atol=1e-5)
    assert relative_error(by_reverse_mode[0, 0], expected) > 1e-2


def test_reverse_mode_of_scatter_reduce_still_counts_what_is_left_out() -> None:
    """The largest of what is scattered, with include_self=False: a tie with the excluded value takes a share."""
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return torch.ones(1, dtype=x.dtype).scatter_reduce(0, torch.tensor([0, 0]), x, "amax", include_self=False)

    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 1 / 3))
    out = fomoh_fx.transform(function, wrt="inputs")(x.detach(), tangents=(torch.eye(2, dtype=x.dtype),))
    torch.testing.assert_close(out.tangent[:, 0], torch.full_like(gradient, 1 / 2))


@pytest.mark.slow
def test_inductor_still_leaves_out_the_factor_of_a_sum_with_a_product() -> None:
    """Then passes/factors.py can go."""

    def scaled(x: Tensor, w: Tensor) -> Tensor:
        return torch.add(x, x @ w, alpha=2)

    x, w = _normal(3, 3), _normal(3, 3)
    assert relative_error(torch.compile(scaled)(x, w), scaled(x, w)) > 0.1


def test_a_custom_function_still_loses_second_order_terms() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x**3

        @staticmethod
        def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * g

        @staticmethod
        def jvp(ctx: torch.autograd.function.FunctionCtx, t: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * t

    x = torch.tensor(1.5, dtype=torch.float64)
    assert _nested(Cube.apply, x, torch.ones_like(x)).item() != pytest.approx(9.0), "PyTorch has repaired it"
    assert _ours(Cube.apply, x, torch.ones_like(x)).cross.item() == pytest.approx(9.0)


def test_nested_forward_mode_is_wrong_on_a_transformer_encoder() -> None:
    """The whole point: an ordinary model, along one direction in its parameters."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 1).double())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}

    def loss(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (x,)).square().mean()

    point, along = tuple(parameters.values()), tuple(directions.values())
    _, slope, truth = reverse_over_reverse(loss, point, [v.unsqueeze(0) for v in along])
    with sdpa_kernel(SDPBackend.MATH):
        nested = torch.func.jvp(lambda *p: torch.func.jvp(loss, p, along)[1], point, along)
    assert relative_error(nested[0], slope.squeeze()) < 1e-8
    assert relative_error(nested[1], truth.squeeze()) > 1e-3, "PyTorch has repaired nested forward mode"
    hd = fomoh_fx.transform(model, lambda y: y.square().mean())
    out = hd(x, tangents={name: v.unsqueeze(0) for name, v in directions.items()}, targets=())
    assert relative_error(out.tangent, slope) < 1e-8
    assert relative_error(out.cross, truth[0]) < 1e-8


def test_third_derivatives_of_layer_norm_by_reverse_mode():
    """Second derivatives of a gradient taken inside a model: PyTorch's are not even symmetric, here they are exact."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, dtype=torch.float64, generator=draw) for shape in ((2, 4), (4,)))
    v = torch.randn(2, 2, 4, dtype=torch.float64, generator=draw)

    def with_gradient(norm):
        def scalar(x):
            return torch.autograd.grad(norm(x).sin().sum(), x, create_graph=True)[0].cos().sum()

        return scalar

    def written_out(x):
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * weight

    _, _, wrong = reverse_over_reverse(with_gradient(lambda x: F.layer_norm(x, (4,), weight)), [x], [v])
    _, _, right = reverse_over_reverse(with_gradient(written_out), [x], [v])
    assert relative_error(wrong, right) > 1e-3
    hd = fomoh_fx.transform(with_gradient(lambda x: F.layer_norm(x, (4,), weight)), wrt="inputs")
    assert relative_error(hd(x, tangents=(v,)).hessian(), right) < 1e-10
