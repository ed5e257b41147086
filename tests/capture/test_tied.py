"""Tied parameters are one input, under the first of their names."""

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import ArgumentError, CaptureError
from tests.models.checking import Problem, check


class ThreeNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(7, 4)
        self.encoder, self.decoder = nn.Embedding(7, 4), nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.encoder.weight = self.decoder.weight = self.head.weight = self.shared.weight

    def forward(self, tokens):
        return self.head((self.encoder(tokens) * self.decoder(tokens.flip(0))).tanh())


@pytest.fixture
def model():
    return ThreeNames().double()


TOKENS = torch.tensor([1, 3, 6])


def test_every_use_is_differentiated(model):
    check(Problem(model, (TOKENS,)))


def test_an_alias_names_the_same_parameter(model):
    tangent = torch.randn(2, 7, 4, dtype=torch.float64)
    hd = fomoh_fx.transform(model)
    first = hd(TOKENS, tangents={"shared.weight": tangent})
    alias = hd(TOKENS, tangents={"head.weight": tangent})
    torch.testing.assert_close(alias.cross, first.cross, rtol=0, atol=0)


def test_two_names_at_once_are_refused(model):
    tangent = torch.randn(2, 7, 4, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="one tied parameter"):
        fomoh_fx.transform(model)(TOKENS, tangents={"head.weight": tangent, "shared.weight": tangent})


def test_the_graph_has_one_input_for_it(model):
    tangent = torch.randn(2, 7, 4, dtype=torch.float64)
    program = fomoh_fx.transform(model).trace(TOKENS, tangents={"shared.weight": tangent}).program
    assert [what.name for what in program.inputs if what.kind == "parameter"] == ["shared.weight"]


class TwiceThere(nn.Module):
    """One module under two names, as a loss that refers to the model."""

    def __init__(self, branches):
        super().__init__()
        self.layer, self.branches = nn.BatchNorm1d(3), branches
        self.same = nn.ModuleList([self.layer])

    def forward(self, x):
        first = self.layer(x).exp()
        if self.branches and first.sum() > 0:
            first = first * 2
        (slope,) = torch.autograd.grad(first.sum(), self.layer.bias, create_graph=True)
        return self.same[0](x).sin() @ slope


def test_a_module_with_two_names_is_as_before():
    model = TwiceThere(False).double()
    before = [*model.parameters(), *model.buffers()]
    check(Problem(model, (torch.randn(4, 3, dtype=torch.float64),)))
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], before, strict=True))


def test_a_module_with_two_names_is_as_before_a_refusal():
    model = TwiceThere(True).double()
    before = [*model.parameters(), *model.buffers()]
    with pytest.raises(CaptureError, match="first.sum"):
        fomoh_fx.transform(model)(torch.randn(4, 3).double(), tangents={"layer.bias": torch.ones(1, 3).double()})
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], before, strict=True))


class Two(nn.Module):
    """Uses two tensors that may be one, and another one."""

    def __init__(self, put, get, kind):
        super().__init__()
        self.scale, self.items = nn.Parameter(torch.ones(3).double()), {}
        self.put, self.get = put, get
        for name, number in (("first", 2.0), ("second", 3.0), ("other", 4.0)):
            put(self, name, kind(torch.full((3,), number).double()))

    def forward(self, x):
        first, second, other = (self.get(self, name) for name in ("first", "second", "other"))
        return (x * self.scale * (first**2 + 10 * second**3 + 100 * other)).sum()


def in_items(model, name, tensor):
    model.items[name] = tensor


def by_key(model, name):
    return model.items[name]


PLACES = {
    "parameters": (setattr, getattr, nn.Parameter),
    "buffers": (nn.Module.register_buffer, getattr, torch.Tensor.clone),
    "attributes": (setattr, getattr, torch.Tensor.clone),
    "container": (in_items, by_key, torch.Tensor.clone),
}
X = torch.linspace(0.1, 1, 3, dtype=torch.float64)


def check_derivative(hd, model):
    """The derivative in all parameters that there are, along ones."""
    out = hd(X, tangents={name: torch.ones(1, *p.shape).double() for name, p in model.named_parameters()})
    value = model(X)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    torch.testing.assert_close(out.primal, value.detach())
    torch.testing.assert_close(out.tangent, sum(g.sum() for g in gradients)[None])


@pytest.mark.parametrize("place", PLACES)
def test_ties_that_come_go_and_move(place):
    put, get, kind = PLACES[place]
    model = Two(put, get, kind)
    hd = fomoh_fx.transform(model)
    tensors = {name: get(model, name) for name in ("first", "second", "other")}
    for name, same in (("second", "first"), ("second", "other"), ("second", "second"), ("first", "other")):
        put(model, name, tensors[same])
        check_derivative(hd, model)


def test_ties_of_a_module_that_a_function_refers_to():
    model = Two(setattr, getattr, nn.Parameter)
    model.second = model.first
    hd = fomoh_fx.transform(lambda x: model(x), wrt="inputs")
    for _ in range(2):
        torch.testing.assert_close(hd(X, tangents=(X[None],)).primal, model(X).detach())
        model.second = model.other


def test_torch_compile_notices_ties():
    model = Two(setattr, getattr, nn.Parameter)
    model.second = model.first
    hd = fomoh_fx.transform(model)
    tangents = {"scale": X[None]}
    hd(X, tangents=tangents)
    torch._dynamo.reset()
    compiled = torch.compile(hd, backend="eager", fullgraph=True)
    compiled(X, tangents=tangents)
    model.second = model.other
    with pytest.raises(Exception, match="a signature that was not traced"):
        compiled(X, tangents=tangents)
    hd(X, tangents=tangents)
    torch.testing.assert_close(compiled(X, tangents=tangents).primal, model(X).detach())
