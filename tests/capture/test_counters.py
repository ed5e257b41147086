"""Models that count their calls in an attribute: refused where the result depends on the number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fomoh_fx
from fomoh_fx.errors import CaptureError


class Counts(nn.Linear):
    def __init__(self, used):
        super().__init__(3, 3)
        self.calls, self.used = 0, used

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (self.calls if self.used else 2)


class Caches(nn.Linear):
    """Notes the largest length that it has seen."""

    def __init__(self):
        super().__init__(3, 3)
        self.length, self.table = 0, torch.zeros(0)

    def forward(self, x):
        if x.shape[0] > self.length:
            self.length = x.shape[0]
        return super().forward(x) * torch.arange(self.length).unsqueeze(1)


def call(model):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    hd = fomoh_fx.transform(model)
    out = hd(x, tangents={"bias": torch.ones(1, 3)})
    return out, x


def test_a_count_that_the_result_depends_on_is_refused():
    model = Counts(used=True)
    with pytest.raises(
        CaptureError, match=r"(?s)changes Counts.calls at every call.*at test_counters.py:\d+, self.calls \+= 1$"
    ):
        call(model)
    assert model.calls == 0


@pytest.mark.parametrize("first", [4, 700, 90_000])
def test_a_count_that_the_result_depends_on_only_later_is_refused(first):
    class WarmsUp(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            y = super().forward(x)
            return 2 * y if self.calls > first else y

    with pytest.raises(CaptureError, match="changes WarmsUp.calls at every call"):
        call(WarmsUp())


@pytest.mark.parametrize("every", [7, 10, 64, 500])
@pytest.mark.parametrize("counted_first", [True, False])
def test_what_every_few_calls_do_is_refused(every, counted_first):
    class Sometimes(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.calls = 1

        def forward(self, x):
            self.calls += counted_first
            y = super().forward(x)
            y = 2 * y if self.calls % every == 0 else y
            self.calls += not counted_first
            return y

    with pytest.raises(CaptureError, match="changes Sometimes.calls at every call"):
        call(Sometimes())


@pytest.mark.parametrize("model", [Counts(used=False), Caches()], ids=["count", "cache"])
def test_a_number_that_does_not_matter_is_captured(model):
    out, x = call(model)
    torch.testing.assert_close(out.primal, model(x).detach())


class KeepsSizes(nn.Module):
    """As models do that note the shape of their input; ``how`` is what this one does."""

    def __init__(self, how: Callable[..., Tensor]) -> None:
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        self.size: Any = None
        self.seen, self.sizes = 0, {"n": 0}

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, (x * self.weight).sin())


def notes_its_shape(model: KeepsSizes, y: Tensor) -> Tensor:
    model.size = tuple(y.shape)
    return y.sum() * model.size[0]


def notes_half_of_it_in_a_dictionary(model: KeepsSizes, y: Tensor) -> Tensor:
    model.sizes["n"] = y.shape[0] / 2
    return y.sum()


def counts_samples(model: KeepsSizes, y: Tensor) -> Tensor:
    model.seen += y.shape[0]
    return y.sum()


def keeps_a_cache(model: KeepsSizes, y: Tensor) -> Tensor:
    """Which has another graph for the size of the call before."""
    if model.size is not None and model.size == y.shape[0]:
        return y.sum() * 3
    model.size = y.shape[0]
    return y.sum()


@pytest.mark.parametrize(
    ("how", "traces"), [(notes_its_shape, 1), (notes_half_of_it_in_a_dictionary, 4), (counts_samples, 1)]
)
def test_dynamic_sizes_that_a_call_keeps(how: Any, traces: int) -> None:
    model, true = KeepsSizes(how), KeepsSizes(how)
    hd, tangents = fomoh_fx.transform(model), {"weight": torch.ones(1, 3, dtype=torch.float64)}
    x = torch.randn(4, 3, dtype=torch.float64)
    hd.trace(x, tangents=tangents, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert model.size is None
    for n in (5, 7, 2, 7):
        x = torch.randn(n, 3, dtype=torch.float64)
        torch.testing.assert_close(hd(x, tangents=tangents).primal, true(x).detach())
        assert (model.size, model.seen, model.sizes) == (true.size, true.seen, true.sizes)
        assert not isinstance(model.seen, torch.SymInt)
    assert len(hd._traced) == traces


def test_a_dynamic_size_that_later_calls_ask_for() -> None:
    model, true = KeepsSizes(keeps_a_cache), KeepsSizes(keeps_a_cache)
    hd, tangents = fomoh_fx.transform(model), {"weight": torch.ones(1, 3, dtype=torch.float64)}
    x = torch.randn(4, 3, dtype=torch.float64)
    hd.trace(x, tangents=tangents, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for n in (5, 5, 7, 7, 5):
        x = torch.randn(n, 3, dtype=torch.float64)
        torch.testing.assert_close(hd(x, tangents=tangents).primal, true(x).detach())
