"""Solvers that adapt: the minimum within a trust region, damping, and what they learn from the steps."""

import math

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import ArgumentError
from fomoh_fx.optim import FoMoHKD, LevenbergMarquardt, Newton, TrustRegion
from tests.optim.problems import Rosenbrock
from tests.optim.test_solvers import plane, r


def model_of(g, h, kappa):
    return kappa @ g + kappa @ h @ kappa / 2


PLANES = {
    "convex": plane(1.0, 2.0, 5.0),
    "indefinite": plane(-1.0, 2.0, 5.0),
    "concave": plane(-3.0, -2.0, -1.0),
    "singular": plane(0.0, 2.0, 5.0),
    "nothing": torch.zeros(3, 3, dtype=torch.float64),
}


@pytest.mark.parametrize("radius", [1e-3, 0.3, 1.0, 100.0])
@pytest.mark.parametrize("kind", PLANES)
def test_the_trust_region_has_the_models_minimum(kind, radius):
    """Against many points of the ball, and by the optimality conditions."""
    h, g = PLANES[kind], r(3)
    solver = TrustRegion(radius)
    kappa = solver(g, h)
    points = torch.randn(20_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lengths = torch.rand(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) ** (1 / 3)
    ball = radius * lengths * points / points.norm(dim=1, keepdim=True)
    assert kappa.norm() <= radius * (1 + 1e-9)
    assert model_of(g, h, kappa) <= min(float(model_of(g, h, b)) for b in ball[:2000]) + 1e-12
    eye = torch.eye(3, dtype=torch.float64)
    damped = h + solver.damping * eye
    assert torch.linalg.eigvalsh(damped)[0] > -1e-9
    torch.testing.assert_close(damped @ kappa, -g, rtol=1e-6, atol=1e-6)
    assert float(solver.damping * (radius - kappa.norm())) == pytest.approx(0, abs=1e-6 * float(solver.damping + 1))


def test_a_saddle_is_left_along_its_negative_curvature():
    h = torch.diag(torch.tensor([-2.0, 3.0], dtype=torch.float64))
    for g in (torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, 0.3], dtype=torch.float64)):
        kappa = TrustRegion(0.5)(g, h)
        assert kappa.norm().item() == pytest.approx(0.5)
        assert model_of(g, h, kappa) < -0.5 * 2 * 0.5**2 * 0.9


def test_the_radius_follows_the_ratio():
    def after(actual, predicted, free=False):
        solver = TrustRegion(0.5)
        solver(r(3), plane(1.0, 2.0, 5.0) * (1e6 if free else 1e-3))
        solver.observe(torch.tensor(actual), torch.tensor(predicted))
        return float(solver.radius)

    assert after(-1.0, -1.0) == 1.0 and after(-1.0, -1.0, free=True) == 0.5
    assert after(-0.5, -1.0) == 0.5
    assert after(-0.1, -1.0) == after(1.0, -1.0) == after(float("nan"), -1.0) == after(-1.0, 0.0) == 0.125


def test_the_damping_follows_the_ratio():
    def after(actual, predicted):
        solver = LevenbergMarquardt(0.2)
        solver.observe(torch.tensor(actual), torch.tensor(predicted))
        return float(solver.damping)

    assert after(-1.0, -1.0) == pytest.approx(0.14) and after(-0.5, -1.0) == pytest.approx(0.2)
    assert after(1.0, -1.0) == after(float("nan"), -1.0) == after(-1.0, 1.0) == pytest.approx(0.8)


@pytest.mark.parametrize("solver", ["levenberg_marquardt", "trust_region"])
@pytest.mark.parametrize("optimizer", [Newton, FoMoHKD])
def test_rosenbrock_from_everywhere(optimizer, solver):
    """Where Newton's own step can go uphill, a solver that adapts reaches the minimum and never lets the loss rise."""
    options = {} if optimizer is Newton else {"directions": 2, "seed": 0}
    starts = torch.empty(6, 2, dtype=torch.float64).uniform_(-2, 2, generator=torch.Generator().manual_seed(0))
    hd = fomoh_fx.transform(Rosenbrock(starts[0]))
    for start in starts:
        hd.load_state_dict({"at": start})
        opt = optimizer(hd, lr=1.0, solver=solver, largest_rise=0.0, **options)
        losses = torch.stack([opt.step() for _ in range(120)])
        assert (losses.diff() <= 0).all()
        assert losses[-1] < 1e-10


def test_every_optimizer_has_a_solver_of_its_own():
    hd = fomoh_fx.transform(Rosenbrock(torch.tensor([-1.0, 1.0], dtype=torch.float64)))
    first, second = Newton(hd, solver="trust_region"), Newton(hd, solver="trust_region")
    first.step()
    assert float(first.solver.radius) != float(second.solver.radius)


def no_length(step, opt, x, y, model):
    opt.param_groups[0]["lr"] = 0.0
    step(x, y)
    opt.param_groups[0]["lr"] = 1.0


def not_finite(step, opt, x, y, model):
    step(x * torch.nan, y)


def no_slope(step, opt, x, y, model):
    step(x, model(x).detach())


@pytest.mark.filterwarnings("ignore:a step was skipped")
@pytest.mark.parametrize("solver", ["levenberg_marquardt", "trust_region"])
@pytest.mark.parametrize("nothing", [no_length, not_finite, no_slope])
def test_steps_that_tell_nothing_are_no_failures(solver, nothing):
    model, opt, x, y, step = regression(solver)
    before = float(getattr(opt.solver, opt.solver.caution))
    for _ in range(12):
        nothing(step, opt, x, y, model)
    assert float(getattr(opt.solver, opt.solver.caution)) == before


@pytest.mark.parametrize("solver", ["levenberg_marquardt", "trust_region"])
def test_a_minimum_is_left_where_the_loss_becomes_another_one(solver):
    """At a minimum the changes of the loss are below its rounding."""
    _, opt, x, y, step = regression(solver)
    for _ in range(60):
        step(x, -y)
    losses = [float(step(x, y)) for _ in range(60)]
    assert losses[-1] < 0.012 < 1 < losses[0]


def test_a_step_that_would_overflow_is_a_failure():
    model, opt, x, y, step = regression("levenberg_marquardt")
    opt.param_groups[0]["lr"] = 1e38
    before = float(opt.solver.damping)
    with pytest.warns(UserWarning, match="skipped"):
        step(1e-3 * x, 1e6 * y)
    assert opt.skipped == 1 and opt.solver.damping > before


def regression(solver):
    """A linear model in float32 that its steps know in every direction: the model, opt, x, y, and opt.step."""
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = x @ torch.randn(6, 1) + 0.1 * torch.randn(64, 1)
    model = nn.Linear(6, 1)
    hd = fomoh_fx.transform(model, nn.functional.mse_loss)
    opt = FoMoHKD(hd, solver=solver, directions=7, seed=0)
    return model, opt, x, y, lambda x, y: opt.step(x, targets=(y,))


def test_groups_with_rates_of_their_own_get_shorter_steps():
    """Nothing is predicted there, so the radius stays as it is."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 6), torch.randn(32, 1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}]
    hd = fomoh_fx.transform(model, lambda o, t: (o - t).pow(4).mean().mul(50).sin() + (o - t).square().mean())
    opt = FoMoHKD(hd, solver=TrustRegion(radius=100.0), params=groups, seed=0)
    losses = [float(opt.step(x, targets=(y,))) for _ in range(40)]
    assert 0 < opt.refused < 20 and losses[-1] < losses[0] - 1
    assert float(opt.solver.radius) == 100
    length = float(opt.state_dict()["length"])
    opt.param_groups[1]["lr"] = 1.0
    opt.step(x, targets=(y,))
    assert float(opt.state_dict()["length"]) == min(1, 2 * length)  # from here on the radius adapts


@pytest.mark.parametrize("solver", ["levenberg_marquardt", "trust_region"])
def test_what_a_solver_learned_is_resumed(solver):
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    hd = fomoh_fx.transform(Rosenbrock(start))
    opt = Newton(hd, solver=solver)
    for _ in range(4):
        opt.step()
    weights, state = {"at": hd.model.at.detach().clone()}, opt.state_dict()
    expected = [float(opt.step()) for _ in range(6)]
    hd.load_state_dict(weights)
    resumed = Newton(hd, solver=solver)
    resumed.load_state_dict(state)
    assert [float(resumed.step()) for _ in range(6)] == expected
    assert resumed.refused == opt.refused


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: TrustRegion(0.0), "radius"),
        (lambda: TrustRegion(-1.0), "radius"),
        (lambda: TrustRegion(math.nan), "radius"),
        (lambda: TrustRegion(least=1.0, most=0.1), "radius"),
        (lambda: LevenbergMarquardt(math.nan), "damping"),
        (lambda: LevenbergMarquardt("a"), "damping"),
        (lambda: LevenbergMarquardt(most=math.inf), "most"),
        (lambda: LevenbergMarquardt(growth=0.5), "growth, decay"),
        (lambda: LevenbergMarquardt(decay=0.0), "growth, decay"),
    ],
)
def test_numbers_that_cannot_adapt_are_refused(make, name):
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        make()
