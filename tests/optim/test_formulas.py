"""Each optimizer's step against its formula, with the slopes and curvatures from reverse mode."""

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.low_rank import dense
from fomoh_fx.optim import FGD, FoMoH, FoMoHKD
from tests.optim.problems import ALL, Quadratic, Rosenbrock, classifier, flat, next_directions, parameters_of
from tests.oracle import reverse_over_reverse

SAMPLERS = ("normal", "rademacher", "sphere", "orthogonal")


def expected_step(opt, g, h, v):
    """theta's change at lr 1, by the formulas of the paper."""
    if isinstance(opt, FGD):
        return -(g @ v) / len(v)
    if isinstance(opt, FoMoH):
        return -((g / (h.diagonal().abs() + opt.eps)) @ v) / len(v)
    return -torch.linalg.solve(h, g) @ v


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("optimizer", ALL)
def test_quadratic_by_hand(optimizer, sampler):
    model = Quadratic()
    opt = optimizer(fomoh_fx.transform(model), lr=0.25, directions=3, sampler=sampler, seed=3)
    for _ in range(2):
        v, before, value = flat(next_directions(opt)), parameters_of(model), model().detach()
        expected = before + 0.25 * expected_step(opt, v @ model.gradient(), v @ model.a @ v.T, v)
        torch.testing.assert_close(opt.step(), value)
        torch.testing.assert_close(parameters_of(model), expected)


@pytest.mark.parametrize("sampler", ["normal", "low_rank"])
@pytest.mark.parametrize("optimizer", ALL)
def test_classifier_against_reverse_mode(optimizer, sampler):
    hd, x, (y,) = classifier()
    names = [name for name, _ in hd.module.named_parameters()]

    def function(*parameters):
        logits = torch.func.functional_call(hd.model, dict(zip(names, parameters, strict=True)), x)
        return nn.functional.cross_entropy(logits, y)

    opt = optimizer(hd, lr=0.1, directions=4, sampler=sampler, seed=0)
    directions = {name: dense(v) for name, v in next_directions(opt).items()}
    value, g, h = reverse_over_reverse(function, [*hd.module.parameters()], [directions[name] for name in names])
    expected = parameters_of(hd.model) + 0.1 * expected_step(opt, g, h, flat(directions))
    torch.testing.assert_close(opt.step(x, targets=(y,)), value)
    torch.testing.assert_close(parameters_of(hd.model), expected)


@pytest.mark.parametrize("solver", ["jitter", "saddle_free"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_plane_that_spans_the_space_is_newton(sampler, solver):
    model = Quadratic()
    opt = FoMoHKD(fomoh_fx.transform(model), lr=1.0, directions=5, sampler=sampler, solver=solver, seed=3)
    assert torch.linalg.cond(flat(next_directions(opt))) < 100
    opt.step()
    torch.testing.assert_close(parameters_of(model), torch.linalg.solve(model.a, model.b))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_expected_step_of_fgd_is_the_gradient(sampler):
    model = Quadratic()
    before, gradient = parameters_of(model), model.gradient()
    count = 5 if sampler == "orthogonal" else 20_000
    FGD(fomoh_fx.transform(model), lr=1.0, directions=count, sampler=sampler, seed=0).step()
    error = (before - parameters_of(model) - gradient).norm() / gradient.norm()
    assert error < (1e-10 if sampler == "orthogonal" else 0.03)  # 5 orthogonal directions are a basis


def test_fomoh_averages_over_its_directions():
    hd = fomoh_fx.transform(Quadratic(), second_order="diagonal")
    many = next_directions(FoMoH(hd, directions=6, seed=0))
    start = {name: p.detach().clone() for name, p in hd.named_parameters()}

    def moved(count, chosen):
        hd.load_state_dict(start)
        FoMoH(hd, lr=1.0, directions=count, sampler=lambda *_: {name: v[chosen] for name, v in many.items()}).step()
        return torch.cat([p.detach() - start[name] for name, p in hd.named_parameters()])

    one_by_one = torch.stack([moved(1, slice(i, i + 1)) for i in range(6)])
    torch.testing.assert_close(moved(6, slice(6)), one_by_one.mean(0))


def test_gauss_newton_curvature_is_used():
    hd, x, (y,) = classifier("ggn")
    opt = FoMoHKD(hd, lr=1.0, directions=3, seed=0)
    assert opt.hd is hd
    v, before = next_directions(opt), parameters_of(hd.model)
    value = hd(x, tangents=v, targets=(y,))
    opt.step(x, targets=(y,))
    expected = before - torch.linalg.solve(value.hessian(), value.tangent) @ flat(v)
    torch.testing.assert_close(parameters_of(hd.model), expected)


def test_rosenbrock_order():
    """In two dimensions the plane is Newton's, the line search is slower, and plain forward gradients slower still."""
    rates = {FGD: {"lr": 1e-4}, FoMoH: {"lr": 1.0}, FoMoHKD: {"lr": 1.0, "directions": 2}}
    starts = torch.empty(5, 2, dtype=torch.float64).uniform_(-2, 2, generator=torch.Generator().manual_seed(0))
    medians = {}
    for optimizer, options in rates.items():
        hd = fomoh_fx.transform(Rosenbrock(starts[0]), second_order=optimizer.second_order)
        reached = []
        for seed, start in enumerate(starts):
            hd.load_state_dict({"at": start})
            opt = optimizer(hd, seed=seed, **options)
            for _ in range(40):
                opt.step()
            reached.append(hd.model().detach())
        medians[optimizer] = torch.stack(reached).median()
    assert medians[FoMoHKD] < 1e-12
    assert medians[FoMoHKD] < medians[FoMoH] < medians[FGD]
