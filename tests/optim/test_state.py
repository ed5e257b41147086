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


class CountingLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()).double())

    def forward(self, output, scale):
        self.calls.add_(1)
        return loss(output, scale)


class Hiding(nn.Module):
    """Its state is a tensor in a list, changed in place, and a module that is no submodule."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.calls, self.norm = [torch.zeros(()).double()], [nn.BatchNorm1d(3).double()]

    def forward(self, x):
        self.calls[0].add_(1)
        return self.norm[0](self.layer(x))


@pytest.mark.parametrize("optimizer, options", [(FoMoH, {"directions": 2}), (FoMoHBP, {})])
@pytest.mark.parametrize("model", [lambda: nn.Linear(3, 3), Hiding])
def test_so_is_state_of_the_loss_and_what_is_changed_in_place(optimizer, options, model):
    torch.manual_seed(0)
    model, counted = model().double(), CountingLoss()
    opt = optimizer(fomoh_fx.transform(model, counted, second_order="diagonal"), lr=0.1, **options)
    counts = [counted.calls, *([model.calls[0], model.norm[0].num_batches_tracked] if hasattr(model, "calls") else [])]
    opt.step(X, targets=(torch.ones(3),))
    assert [int(count) for count in counts] == [1] * len(counts)
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(X, targets=(torch.tensor([1, torch.inf, 1]),))
    assert [int(count) for count in counts] == [1] * len(counts)


def test_a_buffer_that_is_in_a_container_too_is_judged_as_it_was():
    class Averaging(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("mean", torch.zeros(3))
            self.kept = {"mean": self.mean}

        def forward(self, x):
            y = self.layer(x) + self.kept["mean"]
            self.mean.mul_(0.9).add_(y.detach().mean(0))
            return y

    model = Averaging().double()
    model.kept = {"mean": model.mean}
    hd = fomoh_fx.transform(model, loss, second_order="diagonal")
    opt = FoMoH(hd, lr=1e-9, directions=2, diagnostics=True, largest_rise=None)
    for _ in range(2):
        opt.step(X, targets=(torch.ones(3),))
        assert abs(float(opt.last_step.actual)) < 1e-6
    assert [what.name for what in hd.latest.program.inputs if what.kind == "buffer"] == ["mean"]
