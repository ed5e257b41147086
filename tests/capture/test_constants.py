"""Known values stand for tensors while a model is captured, and for no longer."""

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.capture.constants import AsConstants


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("first", torch.tensor([1, 2]))
        self.register_buffer("second", torch.tensor([3, 4]))


def test_an_error_half_way_puts_everything_back():
    holder = Holder()
    before = dict(holder.named_buffers())
    unreadable = torch.empty(2, dtype=torch.int64, device="meta")
    with pytest.raises(NotImplementedError), AsConstants(holder, {"first": before["first"], "second": unreadable}):
        raise AssertionError("is not reached")
    assert all(buffer is before[name] for name, buffer in holder.named_buffers())


class Pooled(nn.Module):
    """The sample of each row decides a size, beside buffers that decide nothing."""

    def __init__(self, edges=None):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.register_buffer("edges", edges)

    def forward(self, x, sample):
        y = self.norm(self.layer(x)).sin()
        if self.edges is not None and int(self.edges[0]) > 0:
            y = y * self.edges
        return y.new_zeros(int(sample.max()) + 1, 3).index_add(0, sample, y)


def trained(model):
    """What an epoch changes in the buffers of a model, of which it makes no use beside its normalisation."""
    model.norm.num_batches_tracked += 1
    model.norm.running_mean += 0.5
    return model


@pytest.mark.parametrize("edges", [None, torch.tensor([1, 2, 3])])
def test_in_eval_what_an_epoch_changes_is_not_captured_again(edges):
    model = Pooled(edges).double().eval()
    hd = fomoh_fx.transform(model, lambda output: output.square().mean())
    x, sample = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3), torch.tensor([0, 0, 1, 1])
    tangents = {"layer.bias": torch.eye(3, dtype=torch.float64)}
    for _ in range(2):
        out = hd(x, sample, tangents=tangents)
        loss = hd.loss(model(x, sample))
        torch.testing.assert_close(out.primal, loss.detach())
        torch.testing.assert_close(out.tangent, torch.autograd.grad(loss, model.layer.bias)[0])
        trained(model)
    assert len(hd._traced) == 1
    assert {what.name for what, _ in hd.latest.program.constants} == {"sample"} | (
        {"edges"} if edges is not None else set()
    )


def mean_of_each(z, y):
    return sum(z[y == c].mean(0).pow(2).sum() for c in y.unique())


def sum_of_each(z, y):
    classes, where, counts = torch.unique(y, return_inverse=True, return_counts=True)
    return (z.new_zeros(len(classes), 3).index_add(0, where, z) / counts.unsqueeze(1)).pow(3).sum()


@pytest.mark.parametrize("loss", [mean_of_each, sum_of_each])
def test_classes_of_a_batch(loss):
    """Which values there are gives sizes; other labels are captured again."""
    model = nn.Linear(3, 3).double()
    hd, x = fomoh_fx.transform(model, loss), torch.randn(5, 3, dtype=torch.float64)
    for labels in ([0, 1, 1, 2, 0], [4, 4, 1, 4, 4], [0, 1, 1, 2, 0]):
        y = torch.tensor(labels)
        out = hd(x, tangents={"bias": torch.eye(3, dtype=torch.float64)}, targets=(y,))
        value = loss(model(x), y)
        torch.testing.assert_close(out.primal, value.detach())
        torch.testing.assert_close(out.tangent, torch.autograd.grad(value, model.bias)[0])


FOLLOWED = {
    "where with numbers": lambda mask: torch.where(mask > 0, 1, 0),
    "where with a number": lambda mask: mask.where(mask > 0, 0),
    "one_hot": lambda mask: torch.nn.functional.one_hot(mask, 3)[:, 1],
    "arange of a tensor": lambda mask: torch.arange(mask.sum()) - 1,
    "full of a tensor": lambda mask: torch.full((2,), mask.sum()),
    "scalar_tensor": lambda mask: torch.maximum(mask, torch.scalar_tensor(0, dtype=torch.int64)),
    "window": lambda mask: torch.hann_window(3),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_known_values_are_followed_through(name):
    """What these make of numbers inside is known as well; other values of the argument are captured again."""

    def loss(z, mask):
        chosen = FOLLOWED[name](mask).nonzero(as_tuple=True)[0]
        return z[chosen].reshape(len(chosen), -1).pow(2).sum() if len(chosen) > 0 else z.sum()

    model = nn.Linear(3, 3).double()
    hd, x = fomoh_fx.transform(model, loss), torch.randn(4, 3, dtype=torch.float64)
    for values in ([0, 1, 1, 0], [1, 0, 0, 2]):
        mask = torch.tensor(values)
        out = hd(x, tangents={"bias": torch.eye(3, dtype=torch.float64)}, targets=(mask,))
        value = loss(model(x), mask)
        torch.testing.assert_close(out.primal, value.detach())
        torch.testing.assert_close(out.tangent, torch.autograd.grad(value, model.bias)[0])


def scattered(z, places):
    rows, columns = zip(*places, strict=True)
    z = z.clone()
    z[rows, columns] = z[list(columns), 1].sum() * z[columns].exp()
    return z[rows, columns].pow(3).sum() + z[rows, 0].sum()


def test_an_index_by_sequences_of_tensors():
    model = nn.Linear(3, 3).double()
    hd, x = fomoh_fx.transform(model, scattered), torch.randn(4, 3, dtype=torch.float64)
    for places in (torch.tensor([[0, 1], [3, 2]]), torch.tensor([[1, 1], [0, 0]])):
        out = hd(x, tangents={"bias": torch.eye(3, dtype=torch.float64)}, targets=(places,))
        value = scattered(model(x), places)
        torch.testing.assert_close(out.primal, value.detach())
        torch.testing.assert_close(out.tangent, torch.autograd.grad(value, model.bias)[0])


@pytest.mark.parametrize("make", [lambda x: x.new_ones(()), torch.ones_like, lambda x: torch.full_like(x, 1)])
def test_numbers_in_a_tensor_like_another_one(make):
    """As the inverse gamma distribution keeps its exponent, which a divergence compares with another one's."""

    def function(x):
        exponent = -make(x)
        return (x**exponent if exponent.eq(-1).all().item() else x).sum()

    x, v = torch.tensor([2.0, 3.0], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    out = fomoh_fx.transform(function, wrt="inputs")(x, tangents=(v,))
    torch.testing.assert_close(out.cross[0], (2 / x**3).sum())
