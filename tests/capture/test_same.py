"""What a model keeps stays the tensor that it was: a parameter, a buffer, an argument, one tensor in two places."""

import copy

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import CaptureError
from fomoh_fx.optim import FoMoHBP

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 2, 3)


def tangents(model):
    return {name: torch.ones_like(p)[None] for name, p in model.named_parameters()}


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.out = kind(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_computes_with_its_parameters_afterwards(kind):
    model = Recurrent(kind).double()
    layer, listed = model.layer, model.layer._flat_weights
    fomoh_fx.transform(model)(X, tangents=tangents(model))
    assert layer._flat_weights is listed
    assert all(weight is p for weight, p in zip(listed, layer.parameters(), strict=True))
    assert all(ref() is p for ref, p in zip(layer._flat_weight_refs, layer.parameters(), strict=True))


def test_reverse_mode_trains_a_recurrent_layer_after_a_call():
    model = Recurrent(nn.LSTM).double()
    optimizer = FoMoHBP(fomoh_fx.transform(model, lambda out: out.square().mean()), lr=0.3)
    for _ in range(2):
        before = model.layer.weight_ih_l0.detach().clone()
        optimizer.step(X, targets=())
        assert not before.equal(model.layer.weight_ih_l0)


def test_a_recurrent_layer_that_lists_other_weights_computes_with_them():
    """As in PyTorch, where it compares its parameters with references to them, and not with the list."""
    model = Recurrent(nn.GRU).double()
    others = model.layer._flat_weights = [p.detach().clone() / 2 for p in model.layer.parameters()]
    out = fomoh_fx.transform(model)(X, tangents=tangents(model))
    assert model.layer._flat_weights is others
    torch.testing.assert_close(out.primal, model(X).detach())


class Keeps(nn.Module):
    """What it keeps is in ``change``, which returns a factor."""

    def __init__(self, change):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 2, 3, dtype=torch.float64))
        self.register_buffer("held", torch.ones(3, dtype=torch.float64))
        self.last = self.other = None
        self.cache, self.plain = {}, torch.zeros(3, dtype=torch.float64)
        self.change = change

    def forward(self, x):
        return (x * self.scale**2 * self.change(self, x)).sum()


def buffer(model, x):
    factor = 1.0 if model.last is None else model.last
    model.last = model.held
    model.held.add_(1)
    return factor


def in_a_dictionary(model, x):
    model.cache["scale"], model.cache["x"] = model.scale, (x, model.held)
    return model.held


def argument(model, x):
    before = 2.0 if model.last is None else model.last
    model.last = x
    return before


def argument_moved_on(model, x):
    before = 3.0 if model.other is None else model.other
    model.last, model.other = x, model.last
    return before


def without_derivative(model, x):
    factor = 1.0 if model.last is None else model.last
    model.last, model.cache["x"] = model.scale.detach(), x.data
    return factor


def twice(model, x):
    factor = model.plain + (1.0 if model.last is None else model.last)
    model.plain = x.detach() + model.plain
    model.last = model.plain
    return factor


def twice_and_one_replaced(model, x):
    factor = 1.0 if model.other is None else model.other
    if model.other is None:
        model.last = model.other = x.detach() * 2
    else:
        model.last = model.last + 1
    return factor


def tensors(model):
    """What it keeps, by place, parameters and buffers too."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found |= {name: getattr(model, name) for name in ("last", "other", "plain")}
    found |= {"cached scale": model.cache.get("scale"), "x": model.cache.get("x")}
    x = found.pop("x")
    found |= {"x": x[0], "cached held": x[1]} if isinstance(x, tuple) else {"x": x}
    return {name: value for name, value in found.items() if value is not None}


def ties(model, x):
    """Which of them are one tensor, and which have one memory."""
    kept = {**tensors(model), "argument": x}
    return {(a, b): (s is t, s.data_ptr() == t.data_ptr()) for a, s in kept.items() for b, t in kept.items()}


CHANGES = [
    buffer, in_a_dictionary, argument, argument_moved_on, without_derivative, twice, twice_and_one_replaced,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_kept_is_the_same_tensor(change):
    model = Keeps(change)
    reference = copy.deepcopy(model)
    hd = fomoh_fx.transform(model)
    for i in range(4):
        x = torch.full((3,), 1.0 + i, dtype=torch.float64)
        out = hd(x, tangents=tangents(model))
        with torch.no_grad():
            torch.testing.assert_close(out.primal, reference(x))
        mine, its = tensors(model), tensors(reference)
        assert ties(model, x) == ties(reference, x)
        assert all(torch.equal(mine[name], value) for name, value in its.items())
        with torch.no_grad():
            for one in (model, reference):
                one.scale.mul_(1.5)


def test_places_of_one_tensor_come_apart():
    """The graph reads one of them; another one is assigned there, by the model or by its user."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.first = self.second = torch.ones(3, dtype=torch.float64)

        def forward(self, x):
            y = (x * self.scale * self.second).sum()
            self.first = self.first * 2
            return y

    model, x = Tied(), torch.ones(3, dtype=torch.float64)
    hd = fomoh_fx.transform(model)
    for expected in (3, 3, 3):
        assert hd(x, tangents=tangents(model)).primal == expected
    model.second = torch.full((3,), 5.0, dtype=torch.float64)
    assert hd(x, tangents=tangents(model)).primal == 15
    model.second = model.first
    for expected in (48, 48):
        assert hd(x, tangents=tangents(model)).primal == expected


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.scale.grad = torch.full((3,), 5.0, dtype=torch.float64)

    def forward(self, x):
        return (x * self.scale * self.scale.grad).sum()


def test_the_gradient_of_a_parameter_is_refused():
    model = Asks()
    with pytest.raises(CaptureError, match=r"reads the gradient \(.grad\) of scale[\s\S]*test_same.py"):
        fomoh_fx.transform(model)(torch.ones(3).double(), tangents=tangents(model))
    assert model.scale.grad.tolist() == [5.0] * 3


class Grows(nn.Module):
    def __init__(self, decides, part):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.decides, self.part = decides, part

    def forward(self, x):
        if not hasattr(self, "made"):
            self.made = self.part(self)
        y = (x * self.scale).sum()
        return -y if self.decides and y > 0 else y


@pytest.mark.parametrize("decides", [False, True])
@pytest.mark.parametrize(
    "part", [lambda model: nn.Linear(2, 2), lambda model: model.scale], ids=["module", "parameter"]
)
def test_what_a_refused_model_has_registered_is_taken_back(decides, part):
    model, x = Grows(decides, part), torch.ones(3).double()
    message = (
        "no frontend could" if decides else "(?s)assigns another (submodule|tensor to a parameter) of its Grows.*made ="
    )
    with pytest.raises(CaptureError, match=message):
        fomoh_fx.transform(model)(x, tangents={"scale": x[None]})
    assert not hasattr(model, "made") and [*model.state_dict()] == ["scale"]
    assert model(x) == (-3 if decides else 3)
