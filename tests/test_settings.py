"""What a model reads while it is captured is part of the signature: after a change it is captured again."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

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


CHANGES = [frozen, scaled, hooked, other_dtype]


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


@pytest.mark.parametrize("change", [frozen, scaled, other_dtype])
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
        (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
        (torch.is_grad_enabled, torch._C._set_grad_enabled, False),
        (lambda: torch.backends.cudnn.enabled, lambda value: setattr(torch.backends.cudnn, "enabled", value), False),
    ],
    ids=["deterministic", "grad mode", "cudnn"],
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
