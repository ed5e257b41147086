"""FoMoH-BP and Newton against their formulas; what a step record tells; steps that are taken back."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import ArgumentError
from fomoh_fx.optim import FGD, FoMoH, FoMoHBP, FoMoHKD, Newton, StepRecord
from tests.optim.problems import Quadratic, Rosenbrock, classifier, flat, next_directions, parameters_of

EVERY = (FGD, FoMoH, FoMoHBP, FoMoHKD, Newton)


# FoMoH-BP.


@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_the_line_search_along_the_gradient(eps):
    model = Quadratic()
    opt = FoMoHBP(fomoh_fx.transform(model), lr=0.5, eps=eps)
    for _ in range(3):
        g, before = model.gradient(), parameters_of(model)
        v = g * (5**0.5 / g.norm())
        expected = before - 0.5 * (v @ g) / (v @ model.a @ v + eps) * v
        torch.testing.assert_close(opt.step(), model_at(before))
        torch.testing.assert_close(parameters_of(model), expected)


def model_at(theta):
    model = Quadratic()
    return (theta @ model.a @ theta / 2 - model.b @ theta).detach()


@pytest.mark.parametrize("loss", [nn.functional.cross_entropy, None])
def test_the_backward_pass_sees_the_evaluations_masks_and_leaves_no_trace(loss):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    x, y = torch.randn(32, 4), torch.randint(0, 3, (32,))

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, x, targets=None):
            return nn.functional.cross_entropy(self.body(x), targets[0])

    model = body if loss else Whole()
    opt = FoMoHBP(fomoh_fx.transform(model, loss), diagnostics=True)
    reference = copy.deepcopy(model)
    torch.manual_seed(5)
    value = nn.functional.cross_entropy(reference(x), y) if loss else reference(x, (y,))
    value.backward()
    norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()
    torch.manual_seed(5)
    with torch.enable_grad():
        opt.step(x, targets=(y,))
    size = sum(p.numel() for p in model.parameters())
    assert float(opt.last_step.slopes[0]) == pytest.approx(float(norm) * size**0.5, rel=1e-4)
    assert int(body[1].num_batches_tracked) == 1
    updated = next(m for m in reference.modules() if isinstance(m, nn.BatchNorm1d))
    torch.testing.assert_close(body[1].running_mean, updated.running_mean)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_zero_gradient_is_no_step():
    model = Quadratic()
    with torch.no_grad():
        minimum = torch.linalg.solve(model.a, model.b)
        model.x.copy_(minimum[:2])
        model.y.copy_(minimum[2:])
    model.b = model.a @ model.theta.detach()
    before = parameters_of(model)
    opt = FoMoHBP(fomoh_fx.transform(model), eps=1e-6)
    opt.step()
    assert opt.skipped == 0
    torch.testing.assert_close(parameters_of(model), before, rtol=0, atol=1e-6)


def test_groups_and_frozen_parameters_of_the_gradient():
    model = Quadratic()
    model.x.requires_grad_(False)
    kept, g = model.x.clone(), model.gradient()[2:]
    before = model.y.detach().clone()
    FoMoHBP(fomoh_fx.transform(model), lr=1.0, eps=0.0).step()
    assert torch.equal(model.x, kept)
    torch.testing.assert_close(model.y.detach(), before - (g @ g) / (g @ model.a[2:, 2:] @ g) * g)


# Newton.


@pytest.mark.parametrize("solver", ["jitter", "saddle_free"])
def test_newton_solves_a_quadratic_in_one_step(solver):
    model = Quadratic()
    Newton(fomoh_fx.transform(model), solver=solver).step()
    torch.testing.assert_close(parameters_of(model), torch.linalg.solve(model.a, model.b))


def test_newton_is_the_limit_of_the_hyperplane_search():
    hd, x, targets = classifier("ggn")
    start, size = copy.deepcopy(hd.state_dict()), parameters_of(hd.model).numel()
    Newton(hd, solver="levenberg_marquardt", largest_rise=10.0).step(x, targets=targets)
    assert not torch.equal(parameters_of(hd.model), torch.cat([p.reshape(-1) for p in start.values()]))
    quadratic = Quadratic()
    one, other = fomoh_fx.transform(quadratic), fomoh_fx.transform(copy.deepcopy(quadratic))
    Newton(one, lr=0.3).step()
    FoMoHKD(other, lr=0.3, directions=5, seed=1).step()
    torch.testing.assert_close(parameters_of(one.model), parameters_of(other.model))
    assert size == 43


def test_newton_trains_what_is_not_frozen():
    model = Quadratic()
    model.y.requires_grad_(False)
    opt = Newton(fomoh_fx.transform(model))
    assert flat(next_directions(opt)).shape == (2, 2)
    opt.step()
    torch.testing.assert_close(model.gradient()[:2], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_refused_step_makes_the_next_one_shorter():
    model = Quadratic()
    opt = Newton(fomoh_fx.transform(model), lr=16.0, diagnostics=True)
    minimum, before = torch.linalg.solve(model.a, model.b), parameters_of(model)
    parts = []
    for _ in range(3):
        opt.step()
        parts.append(float(opt.last_step.part.norm()))
    assert opt.refused == 2
    assert parts == pytest.approx([parts[0], parts[0] / 4, parts[0] / 16])
    torch.testing.assert_close(parameters_of(model), minimum)
    assert float(opt.state_dict()["length"]) == pytest.approx(1 / 8)
    assert not torch.equal(before, minimum)


def test_steps_are_as_long_as_ever_once_they_are_not_looked_at_again():
    model = Quadratic()
    opt = Newton(fomoh_fx.transform(model), lr=16.0)
    opt.step()
    assert opt.refused == 1
    opt.largest_rise, opt.param_groups[0]["lr"] = None, 1.0
    opt.step()
    torch.testing.assert_close(parameters_of(model), torch.linalg.solve(model.a, model.b))


def test_steps_get_longer_again_after_any_number_that_were_refused():
    opt = Newton(fomoh_fx.transform(Quadratic()), lr=16.0)
    for _ in range(600):
        opt.learn(StepRecord(*[torch.zeros(())] * 7, refused=torch.tensor(True)))
    for _ in range(50):
        opt.learn(StepRecord(*[torch.zeros(())] * 7, refused=torch.tensor(False)))
    assert opt._length == 1


# All of them.


@pytest.mark.parametrize("optimizer", EVERY)
def test_it_trains_and_takes_a_scheduler(optimizer):
    hd, x, targets = classifier("ggn")
    rate = {FGD: 0.02, FoMoH: 0.3, FoMoHBP: 0.3, FoMoHKD: 0.5, Newton: 0.5}[optimizer]
    opt = optimizer(hd, lr=rate, **({"solver": "levenberg_marquardt"} if optimizer is Newton else {}))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = []
        for _ in range(20):
            losses.append(float(opt.step(x, targets=targets)))
            scheduler.step()
    assert min(losses[-3:]) < losses[0]
    assert opt.param_groups[0]["lr"] == pytest.approx(rate * 0.9**20)


@pytest.mark.parametrize("optimizer", EVERY)
def test_records_tell_what_the_step_was(optimizer):
    model = Quadratic()
    opt = optimizer(fomoh_fx.transform(model), lr=0.25, diagnostics=True)
    assert opt.last_step is None
    value = model().detach()
    opt.step()
    record = opt.last_step
    torch.testing.assert_close(record.loss, value)
    torch.testing.assert_close(record.actual, model().detach() - value)
    count = {FGD: 1, FoMoH: 1, FoMoHBP: 1, FoMoHKD: 3, Newton: 5}[optimizer]
    assert record.slopes.shape == record.part.shape == (count,)
    assert not record.skipped and not record.refused and record.damping is None
    if optimizer is FGD:
        assert record.eigenvalues is None
        torch.testing.assert_close(record.predicted, record.part @ record.slopes)
    else:  # the loss is quadratic, so the prediction is exact
        torch.testing.assert_close(record.predicted, record.actual)
        assert (record.eigenvalues.diff() >= 0).all()
    if optimizer is Newton:
        torch.testing.assert_close(record.eigenvalues, 5 * torch.linalg.eigvalsh(model.a))
    quiet = optimizer(fomoh_fx.transform(Quadratic()))
    quiet.step()
    assert quiet.last_step is None


def test_records_of_a_solver_that_adapts():
    hd, x, targets = classifier("ggn")
    opt = FoMoHKD(hd, solver="levenberg_marquardt", diagnostics=True, seed=0)
    opt.step(x, targets=targets)
    assert float(opt.last_step.damping) == pytest.approx(0.1)
    assert not opt.last_step.refused


@pytest.mark.parametrize("optimizer", EVERY)
def test_a_step_that_raises_the_loss_is_taken_back(optimizer):
    model = Quadratic()
    opt = optimizer(fomoh_fx.transform(model), lr=1e3, largest_rise=0.5, weight_decay=1e-3, diagnostics=True)
    before = parameters_of(model)
    for count in (1, 2):
        opt.step()
        assert opt.refused == count and opt.skipped == 0
        assert opt.last_step.refused and opt.last_step.actual > 0
    assert torch.equal(parameters_of(model), before)
    resumed = optimizer(fomoh_fx.transform(model))
    resumed.load_state_dict(opt.state_dict())
    assert resumed.refused == 2
    with pytest.raises(ArgumentError, match="^largest_rise: "):
        optimizer(fomoh_fx.transform(model), largest_rise=-1.0)


@pytest.mark.parametrize("optimizer", EVERY)
def test_a_nan_leaves_the_buffers_as_they_were(optimizer):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    x, y = torch.randn(8, 2), torch.randint(0, 2, (8,))
    opt = optimizer(fomoh_fx.transform(model, nn.functional.cross_entropy))
    opt.step(x, targets=(y,))
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(torch.full_like(x, torch.nan), targets=(y,))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    opt.step(x, targets=(y,))
    assert opt.skipped == 1 and int(model[1].num_batches_tracked) == 2
    assert all(v.isfinite().all() for v in model.state_dict().values())


@pytest.mark.parametrize("optimizer", EVERY)
def test_parameters_that_would_overflow_are_left_alone(optimizer):
    """The step is finite, and so are the parameters, but not their sum."""
    model = Rosenbrock(torch.tensor([1.0, 1.5]))
    opt = optimizer(fomoh_fx.transform(model), lr=torch.finfo(torch.float32).max, largest_rise=None)
    with pytest.warns(UserWarning, match="skipped"):
        for _ in range(3):
            opt.step()
    assert model.at.isfinite().all()


@pytest.mark.parametrize("solver", ["jitter", "saddle_free", "levenberg_marquardt", "trust_region"])
@pytest.mark.parametrize("curvature", [0.0, -1.0, 1e-30, -1e-30])
def test_singular_and_indefinite_planes(solver, curvature):
    """Half of the space is straight or bends downwards: no step is lost to a NaN, nothing blows up."""

    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.at = nn.Parameter(torch.tensor([1.0, 1.0, 0.5, 0.5], dtype=torch.float64))

        def forward(self):
            bends = torch.tensor([2.0, 1.0, curvature, curvature], dtype=torch.float64)
            return (bends * (1 - self.at.cos())).sum()

    model = Waves()
    opt = FoMoHKD(fomoh_fx.transform(model), lr=0.5, directions=4, solver=solver, seed=0)
    for _ in range(20):
        opt.step()
    assert opt.skipped == 0
    assert model.at.abs().max() < 100


@pytest.mark.slow
def test_a_compiled_step_is_judged_by_two_replays_with_one_mask():
    """Inductor draws other numbers than the replay; a step of length zero changes nothing all the same."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    hd = fomoh_fx.compile(fomoh_fx.transform(model, nn.functional.cross_entropy))
    opt = FoMoHKD(hd, lr=0.0, directions=2, seed=0, largest_rise=0.0, diagnostics=True)
    for _ in range(4):
        opt.step(x, targets=(y,))
        assert float(opt.last_step.actual) == 0
    assert opt.refused == 0


def test_targets_are_checked():
    hd, x, (y,) = classifier()
    with pytest.raises(ArgumentError, match="^targets: expected a tuple"):
        FGD(hd).step(x, targets=y)


@pytest.mark.parametrize("is_buffer", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_nan_leaves_the_state_of_a_model_as_it_was(is_buffer, in_place):
    class Averaging(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)
            if is_buffer:
                self.register_buffer("mean", torch.zeros(1))
            else:
                self.mean = torch.zeros(1)
            self.table = torch.zeros(1).expand(5)

        def forward(self, x):
            y = self.layer(x)
            mean = 0.5 * self.mean + y.detach().mean(0)
            self.mean = self.mean.copy_(mean) if in_place else mean
            return (y - self.mean).square().sum()

    model = Averaging()
    optimizer = fomoh_fx.optim.FoMoH(fomoh_fx.transform(model), lr=0.1)
    optimizer.step(torch.ones(3, 2))
    before = model.mean.clone()
    assert before != 0
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step(torch.full((3, 2), torch.nan))
    assert optimizer.skipped == 1 and torch.equal(model.mean, before)
