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
