"""What a model keeps in attributes and containers: changed once by a step, and not at all by one that is skipped."""

from collections import deque

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.optim import FoMoH, FoMoHBP

X = torch.linspace(0.1, 1, 6, dtype=torch.float64).reshape(2, 3)


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.recent, self.cache = deque([torch.zeros(3).double()] * 2, maxlen=2), {"mean": torch.zeros(3).double()}
        self.values, self.is_ready, self.calls = [torch.zeros(3).double()], False, 0

    def forward(self, x):
        self.calls += 1
        y = self.layer(x) + self.cache["mean"] + self.recent[0] + self.values[0]
        self.cache["mean"] = 0.9 * self.cache["mean"] + 0.1 * y.mean(0).detach()
        self.recent.append(y[0].detach())
        self.values[0] = y[1].detach()
        self.is_ready = True
        return y


def state(model):
    return [*model.recent, *model.cache.values(), *model.values, model.is_ready]


def loss(output, scale):
    return (output * scale).square().mean()


def check_state(model, expected):
    for now, then in zip(state(model), state(expected), strict=True):
        torch.testing.assert_close(now, then)


def made(optimizer=FoMoH, **options):
    torch.manual_seed(0)
    model = Remembering().double()
    hd = fomoh_fx.transform(model, loss, second_order="diagonal")
    return model, hd, optimizer(hd, lr=0.1, **options)


def test_a_skipped_step_leaves_it():
    model, _, optimizer = made(directions=2)
    optimizer.step(X, targets=(torch.ones(3),))
    before = state(model)
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step(X, targets=(torch.tensor([1, torch.inf, 1]),))
    assert optimizer.skipped == 1 and all(a is b for a, b in zip(state(model), before, strict=True))


def test_a_first_step_that_is_skipped_leaves_it():
    model, _, optimizer = made(directions=2)
    before = state(model)
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step(X, targets=(torch.tensor([1, torch.inf, 1]),))
    assert all(a is b for a, b in zip(state(model), before, strict=True)) and not model.is_ready


@pytest.mark.parametrize("optimizer, options", [(FoMoH, {"directions": 2}), (FoMoHBP, {})])
def test_a_step_changes_it_once(optimizer, options):
    model, hd, optimizer = made(optimizer, **options)
    for _ in range(4):
        other = Remembering().double()
        other.load_state_dict(model.state_dict())
        other.recent, other.cache, other.values = deque(model.recent, 2), dict(model.cache), list(model.values)
        other(X)
        optimizer.step(X, targets=(torch.ones(3),))
        check_state(model, other)
    assert len(hd._traced) == 2  # before there was a value, and after


def test_a_step_is_judged_by_what_it_was_before():
    model, _, optimizer = made(directions=2, diagnostics=True)
    for _ in range(3):
        other = Remembering().double()
        other.recent, other.cache, other.values = deque(model.recent, 2), dict(model.cache), list(model.values)
        before = optimizer.step(X, targets=(torch.ones(3),))
        other.load_state_dict(model.state_dict())
        after = loss(other(X), torch.ones(3)).detach()
        torch.testing.assert_close(optimizer.last_step.actual, after - before)
