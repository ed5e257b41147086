"""torch.func's transforms and gradients inside a model."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jvp, linearize, vmap
from torch.nn import functional as F

import fomoh_fx
from fomoh_fx.errors import CaptureError

D = torch.float64


def r(*shape):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(sum(shape)))


W, B = r(3, 2, 3), r(3)
STEP, OUT = r(3, 4), r(4, 2)


def positive(z):
    return z @ z.mT + torch.eye(3, dtype=D)


def penalty(x):
    """As a critic's: the gradient in its input."""
    return torch.autograd.grad(F.conv1d(x, W, B).tanh().sum(), x, create_graph=True)[0]


def adapted(x):
    """One step of gradient descent on weights and bias."""
    w, b = W.clone().requires_grad_(), B.clone().requires_grad_()
    gw, gb = torch.autograd.grad(F.conv1d(x, w, b).tanh().square().sum(), (w, b), create_graph=True)
    return F.conv1d(x, w - 0.1 * gw, b - 0.1 * gb)


FUNCTIONS = {
    "the gradient of a convolution in its input": (penalty, r(2, 2, 5)),
    "the gradients of a convolution in its weights": (adapted, r(2, 2, 5)),
    "vmap to another dimension": (lambda x: vmap(lambda z: z.sin(), out_dims=1)(x), r(3, 2)),
    "vmap of a factorisation": (lambda x: vmap(lambda z: torch.linalg.cholesky(positive(z)))(x), r(2, 3, 3)),
    "vmap of a solution": (lambda x: vmap(lambda z: torch.linalg.solve(positive(z), z[0]))(x), r(2, 3, 3)),
    "jvp with new numbers": (
        lambda x: jvp(lambda z: (z * torch.ones(4, dtype=D)).sin(), (x,), (x.cos(),))[1],
        r(3, 4),
    ),
    "the Hessian of each sample": (lambda x: vmap(hessian(lambda z: z.sin().prod()))(x), r(2, 3)),
    "the gradient of a bounded function": (lambda x: grad(lambda z: (F.hardtanh(z) * z.sin()).sum())(x), r(3, 4)),
    "forward mode twice": (
        lambda x: jvp(lambda y: jvp(lambda z: F.silu(z) @ OUT, (y,), (STEP,))[1], (x,), (STEP,))[1],
        r(3, 4).flip(0),
    ),
    "forward mode twice, of logsigmoid": (
        lambda x: jvp(lambda y: jvp(F.logsigmoid, (y,), (STEP,))[1], (x,), (STEP,))[1],
        r(3, 4).flip(0),
    ),
    "an expanded tangent": (lambda x: jvp(torch.sin, (x,), (STEP[0].expand(3, 4),))[1], r(3, 4)),
    "rows as point and tangent": (lambda x: jvp(torch.sin, (x[0],), (x[1],))[1], r(3, 4)),
    "unbound and drawn rows as point": (
        lambda x: jvp(
            lambda y, z: (y * z).sin(),
            (x.unbind()[0], torch.rand(2, 4, dtype=D)[0].detach() * 0 + x[1]),
            (x[2], torch.ones(4, dtype=D)),
        )[1],
        r(3, 4),
    ),
    "the Jacobian of each row": (lambda x: torch.stack([jacfwd(lambda z: (z @ OUT).sin())(z) for z in x]), r(3, 4)),
    "the Hessian of each sample of a network": (
        lambda x: vmap(hessian(lambda z: F.silu(z @ STEP).square().sum()))(x),
        r(2, 3),
    ),
    "the Hessian of squares of each sample": (
        lambda x: vmap(hessian(lambda z: (z * z).sum()))(x).sum() * x.prod(),
        r(2, 3),
    ),
    "outputs named as another node": (lambda x: x.median(1)[0] * x.median(), r(3, 4)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exact(name):
    """Against central differences: of these, reverse mode differentiates some once only."""
    function, x = FUNCTIONS[name]
    v = torch.stack([r(*x.shape), r(*x.shape).flip(0)])
    out = fomoh_fx.transform(lambda x: function(x).cos().sum(), wrt="inputs")(x, tangents=(v,))

    def value(*steps):
        at = x + sum(step * direction for step, direction in zip(steps, v, strict=True))
        return function(at.requires_grad_()).cos().sum().detach()

    h = 1e-4
    slopes = torch.stack([(value(h, 0) - value(-h, 0)), (value(0, h) - value(0, -h))]) / (2 * h)
    torch.testing.assert_close(out.tangent, slopes, rtol=1e-6, atol=1e-6)
    mixed = (value(h, h) - value(h, -h) - value(-h, h) + value(-h, -h)) / (4 * h**2)
    own = [(value(*s) - 2 * value(0, 0) + value(*(-n for n in s))) / h**2 for s in ((h, 0), (0, h))]
    torch.testing.assert_close(out.cross, torch.stack([own[0], mixed, own[1]]), rtol=1e-4, atol=1e-5)


def test_a_refusal_inside_a_transform_leaves_it():
    """Else everything after it in the process would run inside the transform."""

    def function(x):
        return jvp(lambda z: z.sin() if z.sum() > 0 else z.cos(), (x,), (x,))[1]

    with pytest.raises(CaptureError):
        fomoh_fx.transform(function, wrt="inputs")(r(3), tangents=(r(1, 3),))
    assert torch.zeros(3).requires_grad_().requires_grad
    torch.testing.assert_close(jvp(torch.sin, (r(3),), (r(3),))[1], r(3).cos() * r(3))


def test_linearize_is_refused():
    """PyTorch folds what depends on the point alone into constants."""
    with pytest.raises(CaptureError, match=r"linearize.*torch\.func\.jvp"):
        fomoh_fx.transform(lambda x: linearize(torch.sin, x)[1](r(3)), wrt="inputs")(r(3), tangents=(r(1, 3),))
