"""Gradient hooks, which reverse mode calls: one that may change a derivative is refused, the others change nothing."""

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import UnsupportedOpError


def double(gradient):
    return 2 * gradient


def look(gradient):
    if gradient is not None:
        gradient.sum()


def look_at_module(module, *gradients):
    module.seen = True


class Hooked(nn.Module):
    """A hook on an activation, made by ``register`` while the model runs."""

    def __init__(self, register=lambda y: None):
        super().__init__()
        self.layer, self.register = nn.Linear(3, 2), register

    def forward(self, x):
        y = self.layer(x)
        self.register(y)
        return y.tanh().sum()


X = torch.rand(4, 3)
V = {"layer.weight": torch.ones(1, 2, 3)}


def tangent(model):
    return fomoh_fx.transform(model)(X, tangents=V).tangent[0]


@pytest.mark.parametrize(
    "register",
    [
        lambda y: y.register_hook(double),
        lambda y: y.requires_grad and y.register_hook(double),
        lambda y: y.register_hook(lambda gradient: gradient if gradient is None else None),
        lambda y: y.grad_fn.register_hook(lambda inputs, outputs: tuple(map(double, inputs))),
        lambda y: y.grad_fn.register_prehook(lambda gradients: tuple(map(double, gradients))),
        lambda y: torch.autograd.graph.saved_tensors_hooks(double, double).__enter__(),
    ],
    ids=["tensor", "if it requires a gradient", "on one path", "node", "before a node", "saved"],
)
def test_a_hook_that_may_change_the_derivative_is_refused(register):
    with pytest.raises(UnsupportedOpError, match=r"(?s)may change the derivative.*test_hooks.py:\d+, lambda y: "):
        tangent(Hooked(register))


def test_a_hook_on_an_input_is_refused():
    def f(x):
        x.register_hook(double)
        return x.sin().sum()

    with pytest.raises(UnsupportedOpError, match=r"(?s)shape \(4, 3\), double, may change.*x.register_hook"):
        fomoh_fx.transform(f, wrt="inputs")(X, tangents=(torch.ones(1, 4, 3),))


@pytest.mark.parametrize(
    "register",
    [
        lambda model: model.layer.register_full_backward_hook(lambda module, inputs, outputs: inputs),
        lambda model: model.layer.register_full_backward_pre_hook(lambda module, outputs: outputs),
        lambda model: model.layer.register_backward_hook(lambda module, inputs, outputs: inputs),
        lambda model: nn.modules.module.register_module_full_backward_hook(lambda module, inputs, outputs: inputs),
    ],
    ids=["full", "before", "old", "global"],
)
def test_a_backward_hook_of_a_module_is_refused(register):
    model = Hooked()
    handle = register(model)
    with pytest.raises(UnsupportedOpError, match=r"(?s)backward hook on (Linear|Hooked).*may change"):
        tangent(model)
    handle.remove()
    tangent(model)


def test_a_hook_on_what_has_a_tangent_is_refused():
    model, x = Hooked(), X.clone().requires_grad_()
    hd = fomoh_fx.transform(model)
    hd(X, tangents=V)
    model.layer.bias.register_hook(double)  # without a tangent here
    hd(X, tangents=V)
    model.layer.weight.register_hook(double)
    with pytest.raises(UnsupportedOpError, match="hook on parameter 'layer.weight', double, may change"):
        hd(X, tangents=V)
    x.register_hook(double)
    with pytest.raises(UnsupportedOpError, match="hook on argument 'x', double, may change"):
        fomoh_fx.transform(model, wrt="inputs")(x, tangents=(torch.ones(1, 4, 3),))


@pytest.mark.parametrize(
    "register",
    [
        lambda y: y.retain_grad(),
        lambda y: y.register_hook(look).remove(),
        lambda y: y.grad_fn.register_hook(lambda inputs, outputs: None),
        lambda y: torch.autograd.graph.register_multi_grad_hook((y,), print),
    ],
    ids=["retain_grad", "tensor", "node", "several"],
)
def test_a_hook_that_only_looks_passes(register):
    torch.testing.assert_close(tangent(model := Hooked(register)), along(model))


def test_hooks_of_a_module_or_parameter_that_only_look_pass():
    model = Hooked()
    model.layer.register_full_backward_hook(look_at_module)
    model.layer.register_full_backward_pre_hook(look_at_module)
    model.layer.weight.register_hook(look)
    model.layer.weight.register_post_accumulate_grad_hook(double)  # changes .grad, which is another matter
    found = tangent(model)
    assert not hasattr(model.layer, "seen")
    torch.testing.assert_close(found, along(model))


def test_activations_saved_on_the_cpu_change_nothing():
    class Saving(Hooked):
        def forward(self, x):
            with torch.autograd.graph.save_on_cpu():
                return super().forward(x)

    torch.testing.assert_close(tangent(model := Saving()), along(model))


def along(model):
    """The derivative along V by reverse mode."""
    (gradient,) = torch.autograd.grad(Hooked.forward(bare(model), X), bare(model).layer.weight)
    return (gradient * V["layer.weight"][0]).sum()


def bare(model):
    """The same parameters without a hook on an activation."""
    model.register = lambda y: None
    return model


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_forward_hook_counts_from_the_call_after_it(kind):
    model = Hooked()
    hd = fomoh_fx.transform(model)
    hd(X, tangents=V)
    change = {
        "register_forward_hook": lambda module, inputs, output: 3 * output,
        "register_forward_pre_hook": lambda module, inputs: (3 * inputs[0],),
    }[kind]
    handle = getattr(model.layer, kind)(change)
    torch.testing.assert_close(hd(X, tangents=V).primal, model(X).detach())
    handle.remove()
    torch.testing.assert_close(hd(X, tangents=V).primal, model(X).detach())


class HooksItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 2, 3, dtype=torch.float64))
        self.is_ready = False

    def forward(self, x):
        if not self.is_ready:
            self.register_forward_hook(lambda module, args, output: 3 * output)
            self.is_ready = True
        return x * self.scale


def test_a_hook_that_a_module_installs_in_its_own_forward_acts_from_the_next_call():
    """PyTorch looks for hooks before it calls forward."""
    model, x = nn.Sequential(HooksItself(), nn.Tanh()), torch.ones(3, dtype=torch.float64)
    hd = fomoh_fx.transform(model)
    for factor in (1, 3, 3):
        out = hd(x, tangents={"0.scale": x[None]})
        torch.testing.assert_close(out.primal, (factor * model[0].scale).tanh().detach())
