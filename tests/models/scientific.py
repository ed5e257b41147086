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


class Field(nn.Sequential):
    """u(t, x), a small perceptron."""

    def __init__(self, inputs: int = 2, outputs: int = 1) -> None:
        super().__init__(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs))


@problem
def burgers_residual_by_autograd() -> Problem:
    class Model(nn.Module):
        """u_t + u u_x - u_xx / 100 by torch.autograd.grad twice."""

        def __init__(self) -> None:
            super().__init__()
            self.u, self.log_viscosity = Field(), nn.Parameter(torch.tensor(-1.0))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            t, x = t.clone().requires_grad_(), x.clone().requires_grad_()
            u = self.u(torch.stack([t, x], -1)).squeeze(-1)
            u_t, u_x = torch.autograd.grad(u, (t, x), torch.ones_like(u), create_graph=True)
            (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
            return (u_t + u * u_x - self.log_viscosity.exp() * u_xx).square().mean()

    return Problem(Model(), (r(4), r(4)))


@problem
def heat_residual_by_jacrev() -> Problem:
    class Model(nn.Module):
        """u_t - u_xx and a boundary term, by functional transforms of functional_call."""

        def __init__(self) -> None:
            super().__init__()
            self.u = Field()

        def forward(self, points: Tensor) -> Tensor:
            parameters = dict(self.u.named_parameters())

            def u(point: Tensor) -> Tensor:
                return torch.func.functional_call(self.u, parameters, (point,)).squeeze(-1)

            slope, curvature = torch.func.jacrev(u), torch.func.jacfwd(torch.func.jacrev(u))
            residual = torch.func.vmap(lambda p: slope(p)[0] - curvature(p)[1, 1])(points)
            return (
                residual.square().mean() + self.u(points * torch.tensor([1.0, 0.0], dtype=points.dtype)).square().mean()
            )

    return Problem(Model(), (r(4, 2),))


@problem
def hamiltonian_network() -> Problem:
    class Model(nn.Module):
        """q' = H_p, p' = -H_q with a learned H, leapfrog steps, slopes by vmap(grad)."""

        def __init__(self) -> None:
            super().__init__()
            self.h = Field()

        def forward(self, state: Tensor) -> Tensor:
            slope = torch.func.vmap(torch.func.grad(lambda s: self.h(s).squeeze(-1)))
            q, p = state[:, :1], state[:, 1:]
            for _ in range(2):
                p = p - 0.05 * slope(torch.cat([q, p], -1))[:, :1]
                q = q + 0.1 * slope(torch.cat([q, p], -1))[:, 1:]
                p = p - 0.05 * slope(torch.cat([q, p], -1))[:, :1]
            return torch.cat([q, p], -1)

    return Problem(Model(), (r(3, 2),))


@problem
def directional_derivative_inside() -> Problem:
    class Model(nn.Module):
        """A sliced score: v^T J v by torch.func.jvp, and the gradient step of an inner problem by vjp."""

        def __init__(self) -> None:
            super().__init__()
            self.score = Field(3, 3)

        def forward(self, x: Tensor, v: Tensor) -> Tensor:
            s, along = torch.func.jvp(self.score, (x,), (v,))
            _, back = torch.func.vjp(self.score, x)
            return (v * along).sum(-1) + s.square().sum(-1) / 2 + back(s)[0].sum(-1)

    return Problem(Model(), (r(3, 3), r(3, 3)))


@problem
def meta_learning() -> Problem:
    class Model(nn.Module):
        """The loss after one inner gradient step, differentiated through the step (MAML)."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.log_rate = Field(2, 1), nn.Parameter(torch.tensor(-2.0))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            def error(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
                return F.mse_loss(torch.func.functional_call(self.net, parameters, (x,)), y)

            parameters = dict(self.net.named_parameters())
            slopes = torch.func.grad(error)(parameters, x[:2], y[:2])
            moved = {name: p - self.log_rate.exp() * slopes[name] for name, p in parameters.items()}
            return error(moved, x[2:], y[2:])

    return Problem(Model(), (r(4, 2), r(4, 1)))


@problem
def neural_ode_fourth_order() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = Field(2, 2)

        def forward(self, x: Tensor, times: Tensor) -> Tensor:
            path = [x]
            for i in range(times.shape[0] - 1):
                h = times[i + 1] - times[i]
                a = self.f(x)
                b = self.f(x + h / 2 * a)
                c = self.f(x + h / 2 * b)
                x = x + h / 6 * (a + 2 * b + 2 * c + self.f(x + h * c))
                path.append(x)
            return torch.stack(path)

    return Problem(Model(), (r(3, 2), torch.tensor([0.0, 0.2, 0.5], dtype=torch.float64)), wrt="parameters")


@problem
def equilibrium_by_while_loop() -> Problem:
    class Model(nn.Module):
        """A deep equilibrium: z = tanh(W z + U x), iterated until it moves no more, by torch's own while_loop."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 3), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            from torch._higher_order_ops import while_loop

            x = self.outer(x)

            def moves(z: Tensor, change: Tensor) -> Tensor:
                return change > 1e-13

            def iterate(z: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
                after = torch.tanh(self.inner(z) / 3 + x)
                return after, (after - z).detach().abs().amax()

            return while_loop(moves, iterate, (torch.zeros_like(x), torch.ones((), dtype=x.dtype)))[0]

    return Problem(Model(), (r(2, 2),), truth="difference", tolerance=1e-5)


@problem
def implicit_layer_by_linear_solve() -> Problem:
    class Model(nn.Module):
        """The fixed point found without derivative, then one Newton step that carries it (the implicit function)."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 3), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            def step(z: Tensor) -> Tensor:
                return torch.tanh(self.inner(z) / 3 + self.outer(x))

            with torch.no_grad():
                z = torch.zeros(x.shape[0], 3, dtype=x.dtype)
                for _ in range(5):
                    z = step(z)
            slope = self.inner.weight / 3 * (1 - step(z).square()).unsqueeze(-1)
            return z - torch.linalg.solve(torch.eye(3, dtype=x.dtype) - slope, z - step(z))

    return Problem(Model(), (r(2, 2),))


@problem
def sinusoidal_representation() -> Problem:
    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(5 * x)

    model = nn.Sequential(nn.Linear(2, 6), Sine(), nn.Linear(6, 6), Sine(), nn.Linear(6, 1))
    return Problem(model, (r(4, 2),))


@problem
def radiance_field() -> Problem:
    class Model(nn.Module):
        """Positional encoding, then volume rendering: weights from a running product of transmittances."""

        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.density = nn.Sequential(nn.Linear(15, 6), nn.ReLU()), nn.Linear(6, 1)
            self.colour = nn.Linear(9, 3)

        def forward(self, origin: Tensor, direction: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
            points = origin.unsqueeze(1) + direction.unsqueeze(1) * depth.unsqueeze(-1)
            scaled = points.unsqueeze(-1) * 2.0 ** torch.arange(2, dtype=points.dtype)
            encoded = torch.cat([points, scaled.sin().flatten(-2), scaled.cos().flatten(-2)], -1)
            h = self.trunk(encoded)
            sigma = F.softplus(self.density(h)).squeeze(-1)
            heading = F.normalize(direction, dim=-1).unsqueeze(1).expand_as(points)
            colour = self.colour(torch.cat([h, heading], -1)).sigmoid()
            steps = torch.cat([depth.diff(dim=1), torch.full_like(depth[:, :1], 1e10)], 1)
            alpha = 1 - torch.exp(-sigma * steps)
            through = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-10], 1), 1)[:, :-1]
            weight = alpha * through
            return (weight.unsqueeze(-1) * colour).sum(1), (weight * depth).sum(1)

    depth = torch.rand(2, 4, dtype=torch.float64).sort(-1).values
    return Problem(Model(), (r(2, 3), r(2, 3), depth))


@problem
def sinkhorn_transport() -> Problem:
    class Model(nn.Module):
        """The entropic optimal transport between two sets of embedded points, in logarithms."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(2, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x, y = self.embed(x).tanh(), self.embed(y).tanh()
            cost = (x.unsqueeze(1) - y.unsqueeze(0)).square().sum(-1)
            f, g = torch.zeros_like(cost[:, 0]), torch.zeros_like(cost[0])
            for _ in range(4):
                f = -0.3 * torch.logsumexp((g - cost) / 0.3, 1)
                g = -0.3 * torch.logsumexp((f.unsqueeze(1) - cost) / 0.3, 0)
            return (((f.unsqueeze(1) + g - cost) / 0.3).exp() * cost).sum()

    return Problem(Model(), (r(4, 2), r(3, 2)))


@problem
def differentiable_sorting() -> Problem:
    class Model(nn.Module):
        """NeuralSort's relaxed permutation, and a network of soft comparisons."""

        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            s = self.score(x).squeeze(-1)
            n = s.shape[-1]
            differences = (s.unsqueeze(-1) - s.unsqueeze(-2)).abs().sum(-1)
            scale = n + 1 - 2 * torch.arange(1, n + 1, dtype=s.dtype)
            relaxed = torch.softmax(scale.unsqueeze(-1) * s.unsqueeze(-2) - differences.unsqueeze(-2), -1)
            values = list(s.unbind(-1))
            for start in (0, 1, 0, 1):
                for i in range(start, n - 1, 2):
                    swap = torch.atan(values[i] - values[i + 1]) / torch.pi + 0.5
                    low, high = torch.lerp(values[i], values[i + 1], swap), torch.lerp(values[i + 1], values[i], swap)
                    values[i], values[i + 1] = low, high
            return relaxed @ s.unsqueeze(-1), torch.stack(values, -1)

    return Problem(Model(), (r(2, 4, 2),))


@problem
def spline_network() -> Problem:
    class Layer(nn.Module):
        """A Kolmogorov-Arnold layer: cubic B-splines of every input by the Cox-de Boor recursion."""

        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.register_buffer("knots", torch.linspace(-2.2, 2.2, 9))
            self.weight, self.base = nn.Parameter(torch.randn(outputs, inputs, 5)), nn.Linear(inputs, outputs)

        def forward(self, x: Tensor) -> Tensor:
            x, knots = x.unsqueeze(-1), self.knots
            basis = ((x >= knots[:-1]) & (x < knots[1:])).to(x.dtype)
            for k in range(1, 4):
                left = (x - knots[: -k - 1]) / (knots[k:-1] - knots[: -k - 1])
                right = (knots[k + 1 :] - x) / (knots[k + 1 :] - knots[1:-k])
                basis = left * basis[..., :-1] + right * basis[..., 1:]
            return F.silu(self.base(x.squeeze(-1))) + torch.einsum("bik,oik->bo", basis, self.weight)

    return Problem(nn.Sequential(Layer(2, 3), Layer(3, 2)), (r(4, 2),))


@problem
def bayesian_linear_regression() -> Problem:
    class Model(nn.Module):
        """The evidence in closed form, by distributions with full covariances."""

        def __init__(self) -> None:
            super().__init__()
            self.features, self.log_noise = nn.Linear(2, 3), nn.Parameter(torch.tensor(-1.0))
            self.factor = nn.Parameter(torch.randn(3, 3) / 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            phi = self.features(x).tanh()
            prior = torch.distributions.MultivariateNormal(
                torch.zeros(3, dtype=x.dtype), scale_tril=self.factor.tril(-1) + torch.eye(3, dtype=x.dtype)
            )
            noise = self.log_noise.exp() * torch.eye(x.shape[0], dtype=x.dtype)
            marginal = torch.distributions.MultivariateNormal(
                torch.zeros_like(y), phi @ prior.covariance_matrix @ phi.T + noise
            )
            standard = torch.distributions.MultivariateNormal(prior.loc, torch.eye(3, dtype=x.dtype))
            return -marginal.log_prob(y) + torch.distributions.kl_divergence(prior, standard)

    return Problem(Model(), (r(4, 2), r(4)))


@problem
def kalman_filter() -> Problem:
    class Model(nn.Module):
        """The likelihood of a linear Gaussian state space, by filtering."""

        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Parameter(torch.eye(2) + torch.randn(2, 2) / 10)
            self.observe = nn.Parameter(torch.randn(1, 2))
            self.log_noise = nn.Parameter(torch.zeros(3))

        def forward(self, observed: Tensor) -> Tensor:
            mean, covariance = torch.zeros(2, dtype=observed.dtype), torch.eye(2, dtype=observed.dtype)
            moved, seen = self.log_noise[:2].exp().diag(), self.log_noise[2:].exp().diag()
            total = torch.zeros((), dtype=observed.dtype)
            for y in observed:
                mean, covariance = self.step @ mean, self.step @ covariance @ self.step.T + moved
                s, error = self.observe @ covariance @ self.observe.T + seen, y - self.observe @ mean
                gain = torch.linalg.solve(s, self.observe @ covariance).T
                total = total + (torch.logdet(s) + error @ torch.linalg.solve(s, error)) / 2
                mean, covariance = mean + gain @ error, covariance - gain @ s @ gain.T
            return total

    return Problem(Model(), (r(3, 1),))


@problem
def first_order_meta_learning() -> Problem:
    class Model(nn.Module):
        """Inner gradient steps whose slopes are constants (without create_graph), as first-order MAML has them."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(2, 1)), nn.Parameter(torch.randn(1))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            fast = [self.weight, self.bias]
            for _ in range(2):
                slopes = torch.autograd.grad(F.mse_loss((x @ fast[0] + fast[1]).tanh(), y), fast)
                fast = [p - 0.1 * slope for p, slope in zip(fast, slopes, strict=True)]
            return F.mse_loss((x @ fast[0] + fast[1]).tanh(), y)

    return Problem(Model(), (r(4, 2), r(4, 1)))
