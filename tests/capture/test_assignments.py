"""Tensors that a model assigns to its attributes while it runs: later calls see them, as in the model."""

import copy

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import CaptureError


class Layer(nn.Module):
    """What a model below does to itself is in ``change``, which returns a tensor to multiply by."""

    def __init__(self, change, through_make_fx=False):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        self.register_buffer("mean", torch.ones(2).double())
        self.register_buffer("index", None)
        self.plain, self.table = torch.ones(2).double(), None
        self.change, self.through_make_fx = change, through_make_fx

    def forward(self, x):
        y = self.layer(x)
        if self.through_make_fx:
            y = y + torch.func.vmap(torch.func.grad(lambda t: t.sin().sum()))(x)[:, :2]
        return (y * self.change(self, y)).tanh().sum()


def moving_average(model, y):
    model.mean = 0.9 * model.mean + 0.1 * y.mean(0).detach()
    return model.mean


def state_in_a_plain_attribute(model, y):
    before = model.plain
    model.plain = y.mean(0).detach() + before
    return before


def state_in_a_submodule(model, y):
    before = getattr(model.layer, "state", None)
    model.layer.state = y.detach().mean() if before is None else before * 2
    return 1.0 if before is None else before


def recorded(model, y):
    model.seen = y
    return 1.0


def cached_by_shape(model, y):
    if model.index is None or model.index.shape != y.shape:
        model.index = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape)
    return model.index


def assigned_and_changed_in_place(model, y):
    model.plain += y.detach().mean(0)
    model.mean *= 2
    return model.plain * model.mean


CHANGES = [
    moving_average, state_in_a_plain_attribute, state_in_a_submodule, recorded, cached_by_shape,
    assigned_and_changed_in_place,
]  # fmt: skip


def tangents(model):
    return {name: torch.ones(1, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()}


@pytest.mark.parametrize("through_make_fx", [False, True], ids=["export", "make_fx"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_later_calls_see_what_was_assigned(change, through_make_fx):
    torch.manual_seed(0)
    model = Layer(change, through_make_fx)
    reference = copy.deepcopy(model)
    hd = fomoh_fx.transform(model)
    for rows in (4, 4, 5, 5, 4):
        x = torch.randn(rows, 3, dtype=torch.float64)
        out, expected = hd(x, tangents=tangents(model)), reference(x)
        gradients = torch.autograd.grad(expected, list(reference.parameters()))
        torch.testing.assert_close(out.primal, expected.detach())
        torch.testing.assert_close(out.tangent[0], sum(g.sum() for g in gradients))
        for mine, its in ((model, reference), (model.layer, reference.layer)):
            assert vars(mine).keys() == vars(its).keys()
            for name, value in (*vars(its).items(), *its.named_buffers()):
                if isinstance(value, (torch.Tensor, int)):
                    torch.testing.assert_close(*map(torch.as_tensor, (getattr(mine, name), value)))


def test_a_trace_changes_nothing():
    for change in CHANGES:
        model = Layer(change)
        before = {**vars(model), **dict(model.named_buffers())}
        fomoh_fx.transform(model).trace(torch.randn(4, 3).double(), tangents=tangents(model))
        after = {**vars(model), **dict(model.named_buffers())}
        assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)


def test_graphs_are_used_again():
    x = torch.randn(4, 3, dtype=torch.float64)
    for change, expected in ((moving_average, 1), (state_in_a_plain_attribute, 1), (recorded, 2)):
        model = Layer(change)
        hd = fomoh_fx.transform(model)
        for _ in range(4):
            hd(x, tangents=tangents(model))
        assert len(hd._traced) == expected


def test_a_plain_tensor_that_is_replaced_between_calls():
    model, x = Layer(lambda model, y: model.plain), torch.randn(4, 3, dtype=torch.float64)
    hd = fomoh_fx.transform(model)
    hd(x, tangents=tangents(model))
    for new in (torch.full((2,), 3.0).double(), torch.full((4, 1), 2.0).double()):
        model.plain = new
        torch.testing.assert_close(hd(x, tangents=tangents(model)).primal, model(x).detach())


def state_with_its_derivative(model, y):
    model.mean = 0.9 * model.mean + 0.1 * y.mean(0)
    return model.mean


def cached_with_its_derivative(model, y):
    if model.table is None:
        model.table = model.layer.bias.exp()
    return model.table


def test_a_derivative_that_would_go_on_in_the_next_call_is_refused():
    x = torch.randn(4, 3, dtype=torch.float64)
    model = Layer(state_with_its_derivative)
    with pytest.raises(CaptureError, match="its attribute mean that an earlier call computed from .*'layer.*detach it"):
        fomoh_fx.transform(model)(x, tangents=tangents(model))
    model = Layer(cached_with_its_derivative)
    hd = fomoh_fx.transform(model)
    hd(x, tangents=tangents(model))
    with pytest.raises(CaptureError, match="that an earlier call computed from .*'layer.bias'.*clear it"):
        hd(x, tangents=tangents(model))
    model.table = None
    hd(x, tangents=tangents(model))


def test_another_parameter_is_refused():
    def change(model, y):
        model.layer.weight = nn.Parameter(model.layer.weight * 2)
        return 1.0

    model = Layer(change)
    with pytest.raises(CaptureError, match="assigns another tensor to a parameter of its Linear"):
        fomoh_fx.transform(model)(torch.randn(4, 3).double(), tangents=tangents(model))


def test_a_module_that_a_function_refers_to():
    model = Layer(moving_average)
    reference, x = copy.deepcopy(model), torch.randn(4, 3, dtype=torch.float64)
    hd = fomoh_fx.transform(lambda x: model(x), wrt="inputs")
    for _ in range(3):
        out = hd(x, tangents=(torch.ones(1, 4, 3).double(),))
        torch.testing.assert_close(out.primal, reference(x).detach())
        torch.testing.assert_close(model.mean, reference.mean)


def registered_once(model, y):
    if not hasattr(model.layer, "centre"):
        model.layer.register_buffer("centre", y.detach().mean(0))
    model.layer.centre.mul_(0.9)
    return model.layer.centre


def registered_for_the_call(model, y):
    model.register_buffer("last", y.detach().mean(0), persistent=False)
    return model.last


def registered_anew(model, y):
    before = model.mean
    del model.mean
    model.register_buffer("mean", before + y.detach().mean(0), persistent=False)
    return model.mean


@pytest.mark.parametrize("change", [registered_once, registered_for_the_call, registered_anew])
def test_a_buffer_that_the_model_registers(change):
    model = Layer(change)
    reference, hd = copy.deepcopy(model), fomoh_fx.transform(model)
    for rows in (4, 4, 3):
        x = torch.randn(rows, 3, dtype=torch.float64)
        out = hd(x, tangents=tangents(model))
        torch.testing.assert_close(out.primal, reference(x).detach())
        torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))
        assert [*model.state_dict()] == [*reference.state_dict()]


def test_capture_registers_no_buffer():
    model = Layer(registered_for_the_call)
    fomoh_fx.transform(model).trace(torch.randn(4, 3, dtype=torch.float64), tangents=tangents(model))
    assert not hasattr(model, "last") and not model._non_persistent_buffers_set
