"""Scientific models: spectra, kernels, linear algebra, differential equations, fixed points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.checking import Problem
from tests.models.registry import problem, r


class FourierLayer(nn.Module):
    """A Fourier neural operator's layer: the lowest modes times complex weights, plus a pointwise map."""

    def __init__(self, weight_is_complex: bool) -> None:
        super().__init__()
        weight = torch.randn(3, 3, 4, 2, dtype=torch.float64)
        self.weight = nn.Parameter(torch.view_as_complex(weight) if weight_is_complex else weight)
        self.skip = nn.Conv1d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        modes = torch.fft.rfft(x)[..., :4]
        y = torch.einsum("bim,iom->bom", modes, weight)
        return F.gelu(torch.fft.irfft(y, n=x.shape[-1]) + self.skip(x))


@problem
def fourier_operator() -> Problem:
    return Problem(nn.Sequential(FourierLayer(False), FourierLayer(False)), (r(2, 3, 9),))


@problem
def fourier_operator_complex_parameters() -> Problem:
    return Problem(nn.Sequential(FourierLayer(True), FourierLayer(True)), (r(2, 3, 8),))


@problem
def spectral_magnitude() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            spectrum = torch.fft.fft(x * self.kernel)
            grid = torch.fft.ifft2(torch.fft.fft2(torch.outer(self.kernel, self.kernel)) * spectrum[0])
            return torch.cat([spectrum.abs(), spectrum.angle(), grid.real])

    return Problem(Model(), (r(2, 6),))


@problem
def gaussian_process() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale, self.log_noise = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.tensor(-1.0))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z = x / self.log_scale.exp()
            distances = (z.unsqueeze(0) - z.unsqueeze(1)).square().sum(-1)
            kernel = (-distances / 2).exp() + self.log_noise.exp() * torch.eye(x.shape[0], dtype=x.dtype)
            factor = torch.linalg.cholesky(kernel)
            fit = torch.cholesky_solve(y.unsqueeze(-1), factor).squeeze(-1)
            return y @ fit / 2 + factor.diagonal().log().sum()

    return Problem(Model(), (r(5, 3), r(5)))


@problem
def linear_algebra_layer() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            skew = self.weight - self.weight.T
            orthogonal = torch.linalg.matrix_exp(skew)
            y = torch.linalg.solve(torch.eye(4, dtype=x.dtype) * 3 + skew, x.T).T
            spectral = torch.linalg.eigvalsh(self.weight @ self.weight.T)
            return torch.cat([y @ orthogonal, spectral.expand(1, 4), torch.linalg.inv(self.weight)])

    return Problem(Model(), (r(3, 4),))


@problem
def kernel_regression() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres, self.values = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            weights = torch.softmax(-torch.cdist(x, self.centres), -1)
            return weights @ F.normalize(self.values, dim=-1) + F.cosine_similarity(x[:, :2], self.values[:1]).mean()

    return Problem(Model(), (r(5, 3),), truth="difference", tolerance=1e-5)  # reverse mode lacks cdist's second


@problem
def fixed_point_iterations() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.zeros(x.shape[0], 4, dtype=x.dtype)
            for _ in range(6):
                z = torch.tanh(self.inner(z) / 2 + self.outer(x))
            return z

    return Problem(Model(), (r(2, 3),))


@problem
def neural_ode() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = nn.Sequential(nn.Linear(3, 6), nn.Softplus(), nn.Linear(6, 2))

        def slope(self, t: float, x: Tensor) -> Tensor:
            return self.field(torch.cat([x, torch.full_like(x[:, :1], t)], -1))

        def forward(self, x: Tensor, steps: int = 3) -> Tensor:
            h = 1 / steps
            for t in torch.arange(steps).mul(h).tolist():
                a = self.slope(t, x)
                b = self.slope(t + h / 2, x + h / 2 * a)
                x = x + h * b
            return x

    return Problem(Model(), (r(3, 2),), {"steps": 2})


@problem
def physics_informed() -> Problem:
    class Model(nn.Module):
        """The residual of a Poisson equation: the Laplacian in the inputs, inside the model."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))

        def forward(self, x: Tensor) -> Tensor:
            def u(point: Tensor) -> Tensor:
                return self.net(point).squeeze(-1)

            laplacian = torch.func.vmap(lambda p: torch.func.hessian(u)(p).diagonal().sum())(x)
            return laplacian + x.sin().prod(-1)

    return Problem(Model(), (r(3, 2),))


@problem
def physics_informed_by_autograd() -> Problem:
    class Model(nn.Module):
        """The slope in the inputs by torch.autograd.grad, inside the model."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            y = self.net(x)
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            return (slope.square().sum(-1) - 1).square()

    return Problem(Model(), (r(3, 2),))


@problem
def laplacian_of_inputs() -> Problem:
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Softplus(), nn.Linear(6, 1))
    return Problem(model, (r(4, 3),), wrt="inputs")
