"""What a model reads while it is captured is part of the signature: after a change it is captured again."""

import subprocess
import sys
from contextlib import contextmanager
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import fomoh_fx

X = torch.linspace(0.1, 1, 6, dtype=torch.float64).reshape(2, 3)


class Asking(nn.Module):
    """Its value depends on facts that are in no tensor."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 3), 1.5

    def forward(self, x):
        y = self.layer(x) * self.scale
        if not self.layer.weight.requires_grad:
            y = y.sin()
        if x.requires_grad:
            y = y * 2
        if torch.are_deterministic_algorithms_enabled():
            y = y * 5
        return (y * torch.tensor([1 / 3, 1, 1])).sum()


@contextmanager
def changed(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def frozen(model):
    return changed(lambda: model.layer.weight.requires_grad, model.layer.weight.requires_grad_, False)


def scaled(model):
    return changed(lambda: model.scale, lambda value: setattr(model, "scale", value), 3.0)


def hooked(model):
    return model.layer.register_forward_hook(lambda module, args, output: output.cos())


def other_dtype(model):
    return changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64)


def deterministic(model):
    return changed(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True)


CHANGES = [frozen, scaled, hooked, other_dtype, deterministic]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change):
    model = Asking().double()
    hd = fomoh_fx.transform(model)
    tangents = {"layer.bias": X[:1]}
    for _ in range(2):
        torch.testing.assert_close(hd(X, tangents=tangents).primal, model(X).detach(), rtol=1e-12, atol=0)
        with change(model):
            torch.testing.assert_close(hd(X, tangents=tangents).primal, model(X).detach(), rtol=1e-12, atol=0)
    assert len(hd._traced) == 2 or change is hooked  # a hook is another one each time


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_module_that_a_function_refers_to(change):
    model = Asking().double()
    hd = fomoh_fx.transform(lambda x: model(x), wrt="inputs")
    for _ in range(2):
        for x in (X, X.clone().requires_grad_()):
            with change(model) if x.requires_grad else frozen(model):
                asked = hd(x, tangents=(X[None],))
                torch.testing.assert_close(asked.primal, model(X.clone().requires_grad_()).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("change", [frozen, scaled, other_dtype, deterministic])
def test_torch_compile_notices_it(change):
    model = Asking().double()
    hd = fomoh_fx.transform(model)
    tangents = {"layer.bias": X[:1]}
    hd(X, tangents=tangents)
    torch._dynamo.reset()
    compiled = torch.compile(hd, backend="eager", fullgraph=True)
    compiled(X, tangents=tangents)
    with change(model):
        with pytest.raises(Exception, match="a signature that was not traced"):
            compiled(X, tangents=tangents)
        hd(X, tangents=tangents)
        torch.testing.assert_close(compiled(X, tangents=tangents).primal, model(X).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(compiled(X, tangents=tangents).primal, model(X).detach(), rtol=1e-12, atol=0)


def test_an_argument_that_requires_a_gradient():
    model = Asking().double()
    hd = fomoh_fx.transform(model)
    tangents = {"layer.bias": X[:1]}
    for x in (X, X.clone().requires_grad_(), X):
        torch.testing.assert_close(hd(x, tangents=tangents).primal, model(x).detach())
    assert len(hd._traced) == 2


def test_products_by_sums_go_by_the_precision_of_products():
    model = nn.Linear(3, 1)
    hd = fomoh_fx.transform(model)
    x, tangents = X.float(), {"bias": torch.ones(1, 1)}
    hd(x, tangents=tangents)
    with changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"):
        hd(x, tangents=tangents)
    assert len(hd._traced) == 2


def test_what_factories_make_is_on_the_default_device():
    hd = fomoh_fx.transform(lambda x: (x * torch.ones(3)).sum(), wrt="inputs")
    hd(X, tangents=(X[None],))
    with torch.device("meta"), pytest.raises(Exception, match="meta"):
        hd(X, tangents=(X[None],))


@pytest.mark.parametrize(
    "get, put, value",
    [
        (torch.is_grad_enabled, torch._C._set_grad_enabled, False),
        (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled, False),
    ],
    ids=["grad mode", "cudnn"],
)
def test_what_changes_no_graph_is_not_captured_again(get, put, value):
    hd = fomoh_fx.transform(nn.Linear(3, 1).double())
    tangents = {"bias": X[:1, :1]}
    hd(X, tangents=tangents)
    with changed(get, put, value):
        hd(X, tangents=tangents)
    assert len(hd._traced) == 1


class Layers(nn.Module):
    """Two layers alike, and buffers alike, in a list and under a name."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)])
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x).sum()


def replaced_layer(model):
    model.head = nn.Linear(3, 1).double().eval()


def swapped_layers(model):
    model.layers[0], model.layers[2] = model.layers[2], model.layers[0]


def swapped_buffers(model):
    model.layers[1], model.layers[3] = model.layers[3], model.layers[1]


@pytest.fixture
def layers():
    torch.manual_seed(0)
    model = Layers().double()
    for layer in (model.layers[1], model.layers[3]):
        nn.init.normal_(layer.running_mean)
    return model.eval()


REPLACED = [replaced_layer, swapped_layers, swapped_buffers]


@pytest.mark.parametrize("replace", REPLACED)
def test_other_layers_are_noticed(layers, replace):
    hd = fomoh_fx.transform(layers)
    tangents = {"head.bias": X[:1, :1]}
    hd(X, tangents=tangents)
    replace(layers)
    torch.testing.assert_close(hd(X, tangents=tangents).primal, layers(X).detach())
    layers.head.weight = nn.Parameter(2 * layers.head.weight.detach())
    torch.testing.assert_close(hd(X, tangents=tangents).primal, layers(X).detach())
    assert len(hd._traced) == 2


@pytest.mark.parametrize("replace", REPLACED[::2])
def test_torch_compile_notices_other_layers(layers, replace):
    hd = fomoh_fx.transform(layers)
    tangents = {"head.bias": X[:1, :1]}
    hd(X, tangents=tangents)
    torch._dynamo.reset()
    compiled = torch.compile(hd, backend="eager", fullgraph=True)
    compiled(X, tangents=tangents)
    replace(layers)
    with pytest.raises(Exception, match="a signature that was not traced"):
        compiled(X, tangents=tangents)
    hd(X, tangents=tangents)
    torch.testing.assert_close(compiled(X, tangents=tangents).primal, layers(X).detach())


def test_a_loss_and_a_module_of_a_function_with_another_layer(layers):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1).double()

        def forward(self, output):
            return self.layer(output).sum()

    loss = Loss()
    hd = fomoh_fx.transform(lambda x: layers(x) * x, loss, wrt="inputs")
    for change in (lambda: None, lambda: swapped_layers(layers), lambda: setattr(loss, "layer", Loss().layer)):
        change()
        out = hd(X, tangents=(X[None],), targets=())
        torch.testing.assert_close(out.primal, loss(layers(X) * X).detach())


class Reads(nn.Module):
    """Multiplies by what it reads of itself."""

    def __init__(self, read):
        super().__init__()
        self.layer, self.read = nn.Linear(3, 3), read
        self.config, self.layers, self.pair = SimpleNamespace(scale=2.0), {"act": nn.Tanh()}, (1, 2)
        self.constant, self.activation, self.kind = torch.ones(3).double(), self.sine, nn.Tanh
        self.numbers = [[1, 2.0]]
        self.register_buffer("buffer", torch.ones(3))

    def sine(self, y):
        return y.sin()

    def cosine(self, y):
        return y.cos()

    def forward(self, x):
        return self.read(self, self.layer(x)).sum()


def put(name, value):
    return lambda model: setattr(model, name, value)


def other_forward(self, x):
    return self.layer(x).exp().sum()


READS = {
    "config": (lambda m, y: y * m.config.scale, lambda m: setattr(m.config, "scale", 3.0)),
    "pair": (lambda m, y: y * m.pair[0], put("pair", (5, 2))),
    "a module in a dictionary": (lambda m, y: m.layers["act"](y), lambda m: m.layers.update(act=nn.Sigmoid())),
    "method": (lambda m, y: m.activation(y), lambda m: setattr(m, "activation", m.cosine)),
    "forward": (lambda m, y: y, lambda m: setattr(m, "forward", MethodType(other_forward, m))),
    "class": (lambda m, y: m.kind()(y), put("kind", nn.Sigmoid)),
    "a list": (lambda m, y: y * m.numbers[0][1], lambda m: m.numbers[0].__setitem__(1, 5.0)),
    "a buffer that requires a gradient": (
        lambda m, y: y * (2 if m.buffer.requires_grad else 1),
        lambda m: m.buffer.requires_grad_(),
    ),
    "an attribute that requires a gradient": (
        lambda m, y: y * (2 if m.constant.requires_grad else 1),
        lambda m: m.constant.requires_grad_(),
    ),
}


@pytest.mark.parametrize("name", READS)
def test_a_change_of_what_it_reads_of_itself(name):
    read, change = READS[name]
    model = Reads(read).double()
    hd = fomoh_fx.transform(model)
    tangents = {"layer.bias": X[:1]}
    for _ in range(2):
        torch.testing.assert_close(hd(X, tangents=tangents).primal, model(X).detach())
    change(model)
    for _ in range(2):
        torch.testing.assert_close(hd(X, tangents=tangents).primal, model(X).detach())
    assert len(hd._traced) == 2


def test_hooks_of_all_modules():
    model = Reads(lambda m, y: y.sin()).double()
    hd = fomoh_fx.transform(model)
    tangents = {"layer.bias": X[:1]}
    hd(X, tangents=tangents)
    handle = register_module_forward_hook(lambda module, args, out: out * 3 if module is model else None)
    try:
        torch.testing.assert_close(hd(X, tangents=tangents).primal, model(X).detach())
    finally:
        handle.remove()


ONES, COMPLEX = torch.ones(3).double(), torch.tensor([1j, 2, 1 + 1j], dtype=torch.complex128)
ARGUMENTS = {
    "zero": (lambda x, s: x * torch.copysign(torch.ones(()).double(), torch.tensor(s)), 0.0, -0.0),
    "leaf": (
        lambda x, d: x * (2 if d.is_leaf else 1),
        ONES.clone().requires_grad_(),
        ONES.clone().requires_grad_() * 1,
    ),
    "parameter": (
        lambda x, d: x * (2 if isinstance(d, nn.Parameter) else 1),
        ONES.clone().requires_grad_(),
        nn.Parameter(ONES.clone()),
    ),
    "conj": (lambda x, d: x * torch.view_as_real(d.resolve_conj())[:, 1], COMPLEX, COMPLEX.conj()),
    "is conj": (lambda x, d: x * (2 if d.is_conj() else 1) * d.imag, COMPLEX, COMPLEX.conj()),
    "is neg": (lambda x, d: x * (2 if d.is_neg() else 1) * d, ONES, torch._neg_view(ONES)),
    "strides": (lambda x, d: x * d.stride(0), torch.ones(1, 4), torch.ones(1, 4).as_strided((1, 4), (100, 1))),
}


@pytest.mark.parametrize("name", ["pair", "method", "class", "a list", "a module in a dictionary"])
def test_torch_compile_notices_what_it_reads_of_itself(name):
    read, change = READS[name]
    model = Reads(read).double()
    hd = fomoh_fx.transform(model)
    tangents = {"layer.bias": X[:1]}
    hd(X, tangents=tangents)
    torch._dynamo.reset()
    compiled = torch.compile(hd, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, tangents=tangents).primal, model(X).detach())
    change(model)
    with pytest.raises(Exception, match="a signature that was not traced"):
        compiled(X, tangents=tangents)
    hd(X, tangents=tangents)
    torch.testing.assert_close(compiled(X, tangents=tangents).primal, model(X).detach())


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_it_asks_of_an_argument(name):
    function, *values = ARGUMENTS[name]
    hd = fomoh_fx.transform(function, wrt="inputs")
    for value in (*values, *values):
        torch.testing.assert_close(hd(X, value, tangents=(X[None], None)).primal, function(X, value).detach())
    assert len(hd._traced) == 2


@pytest.mark.parametrize("argument", [np.array([2.0]), SimpleNamespace(k=2.0), {2.0}], ids=["array", "object", "set"])
def test_an_argument_that_is_changed_in_place(argument):
    def function(x, a):
        return x.sin() * float(a.k if isinstance(a, SimpleNamespace) else next(iter(a)))

    hd = fomoh_fx.transform(function, wrt="inputs")
    for number in (2.0, 5.0, 2.0):
        if isinstance(argument, np.ndarray):
            argument[0] = number
        elif isinstance(argument, set):
            argument.clear()
            argument.add(number)
        else:
            argument.k = number
        torch.testing.assert_close(hd(X, argument, tangents=(X[None], None)).primal, function(X, argument))
    assert len(hd._traced) == 2


def test_a_capture_leaves_what_pytorch_makes_on_a_device():
    """In a process of its own: PyTorch looks up once which functions these are, perhaps while a model is captured."""
    program = """
import torch, fomoh_fx

def model(x):
    with torch.device("cpu"):
        return (x * torch.ones(3)).sum()

fomoh_fx.transform(model, wrt="inputs")(torch.ones(2, 3), tangents=(torch.ones(1, 2, 3),))
with torch.device("meta"):
    assert torch.tensor(1.0).is_meta and torch.as_tensor([1.0]).is_meta and torch.get_default_device().type == "meta"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
