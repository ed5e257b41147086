"""Weight decay: no part of what a step is judged by, so that it neither misleads a solver nor stops training."""

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx import lower
from fomoh_fx.optim import FGD, FoMoH, FoMoHBP, FoMoHKD, Newton
from tests.optim.problems import Quadratic, parameters_of

EVERY = (FGD, FoMoH, FoMoHBP, FoMoHKD, Newton)
LOOKS = ({"largest_rise": 10.0}, {"diagnostics": True, "largest_rise": None})


def regression():
    """A linear model in float32, and its batch."""
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    return nn.Linear(6, 1), x, (x @ torch.randn(6, 1) + 0.1 * torch.randn(64, 1),)


@pytest.mark.parametrize("looks", LOOKS, ids=str)
@pytest.mark.parametrize(
    ("optimizer", "lowering"), [*((kind, lower.eager) for kind in EVERY), (FoMoHKD, lambda module, dynamic: module)]
)
def test_a_step_that_is_looked_at_goes_to_the_same_place(optimizer, looks, lowering):
    def after(**options):
        model = Quadratic()
        hd = fomoh_fx.transform(model, second_order=optimizer.second_order)
        hd.lowering = lowering
        seed = {"seed": 0} if "seed" in optimizer.__init__.__kwdefaults__ else {}
        opt = optimizer(hd, lr=0.02, weight_decay=0.3, **seed, **options)
        opt.step()
        return opt, parameters_of(model)

    (opt, there), (_, expected) = after(**looks), after(largest_rise=None)
    torch.testing.assert_close(there, expected)
    if opt.diagnostics and optimizer is not FGD:  # the loss is quadratic, so the prediction is exact
        torch.testing.assert_close(opt.last_step.actual, opt.last_step.predicted)


@pytest.mark.parametrize("solver", ["levenberg_marquardt", "trust_region"])
def test_decay_does_not_look_like_a_failure_to_a_solver_that_adapts(solver):
    """Near the minimum of the sum the decay undoes what a step gains, and only the decay would go on."""
    model, x, targets = regression()
    hd = fomoh_fx.transform(model, nn.functional.mse_loss)
    opt = FoMoHKD(hd, lr=0.1, solver=solver, weight_decay=0.01, seed=0)
    losses = [float(opt.step(x, targets=targets)) for _ in range(400)]
    assert max(losses[-100:]) < 0.05 < losses[0]


@pytest.mark.parametrize("solver", ["jitter", "levenberg_marquardt"])
def test_decay_that_raises_the_loss_does_not_stop_training(solver):
    model, x, targets = regression()
    hd = fomoh_fx.transform(model, nn.functional.mse_loss)
    opt = FoMoHKD(hd, lr=1.0, solver=solver, directions=7, weight_decay=0.1, seed=0)
    for _ in range(100):
        opt.step(x, targets=targets)
    assert opt.refused < 10
    opt.param_groups[0]["weight_decay"] = 0.0
    for _ in range(30):
        loss = opt.step(x, targets=targets)
    assert loss < 0.012
