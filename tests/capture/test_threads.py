"""Captures in several threads, and one inside another: each is right, and leaves PyTorch as it was."""

import contextlib
import threading

import torch
from torch import nn
from torch._subclasses import fake_tensor

import fomoh_fx

ONES = torch.ones(3, dtype=torch.float64)


def patched():
    return (
        "__new__" in vars(torch.Tensor), torch.LongTensor, torch.from_numpy, fake_tensor.CONSTANT_NUMEL_LIMIT,
        fake_tensor.FakeTensorMode._dispatch_impl, nn.Module.__setattr__,
    )  # fmt: skip


def slope(power):
    """Of a sum of powers, with a tensor that the function refers to."""
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    hd = fomoh_fx.transform(lambda x: (x**power * weights).sum(), wrt="inputs")
    return float(hd(ONES, tangents=(ONES[None],)).tangent)


def test_captures_in_several_threads():
    before, found = patched(), {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: slope(i)})) for i in range(2, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {2: 12.0, 3: 18.0, 4: 24.0}
    assert patched() == before


def test_a_model_that_runs_in_another_thread_meanwhile_is_left_alone():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.last = 0, None

        def forward(self, x):
            self.calls += 1
            self.last = x * 2
            return self.last

    other = Counts()

    def function(x):
        thread = threading.Thread(target=lambda: other(ONES))
        thread.start()
        thread.join()
        return (x**3).sum()

    fomoh_fx.transform(function, wrt="inputs")(ONES, tangents=(ONES[None],))
    assert other.calls >= 1
    assert type(other.last) is torch.Tensor and other.last.equal(2 * ONES)


def test_a_capture_inside_another_one():
    before = patched()

    def function(x):
        slope(2)
        return (torch.Tensor([2.0]).double() * x**3).sum()

    hd = fomoh_fx.transform(function, wrt="inputs")
    with contextlib.suppress(fomoh_fx.FomohError):  # where no frontend bears another one inside
        assert hd(ONES, tangents=(ONES[None],)).tangent == 18
    assert patched() == before
