"""State that a model keeps in lists, dictionaries, tuples and objects: carried from call to call, or refused."""

import copy
import functools
from collections import defaultdict, deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import CaptureError


@dataclass
class Record:
    value: Any = 1.0


class Keeps(nn.Module):
    """What a model below does with its containers is in ``change``, which returns a factor."""

    def __init__(self, change, through_make_fx=False):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        self.cache, self.items, self.recent, self.state = {}, [], deque(maxlen=2), None
        self.pair, self.record = (Record(), {"inner": {}}), SimpleNamespace(value=1.0)
        self.plain, self.own = torch.ones(2).double(), (Table(), Items([torch.ones(2).double()]))
        self.change, self.through_make_fx = change, through_make_fx

    def forward(self, x):
        y = self.layer(x)
        if self.through_make_fx:
            y = y + torch.func.vmap(torch.func.grad(lambda t: t.sin().sum()))(x)[:, :2]
        return (y * self.change(self, y)).tanh().sum()


def mean(y):
    return y.detach().mean(0)


def in_a_dictionary(model, y):
    before = model.cache.get("h", 1.0)
    model.cache["h"] = mean(y) + before
    return before


def in_a_tuple(model, y):
    h, c = model.state if model.state is not None else (1.0, 2.0)
    model.state = (mean(y) + h, mean(y) * c)
    return h + c


def in_objects(model, y):
    first, second = model.pair
    factor = first.value + model.record.value + second["inner"].get(3, 0.0)
    first.value = model.record.value = mean(y)
    second["inner"][3] = mean(y).exp()
    return factor


def in_a_list_of_places(model, y):
    if not model.items:
        model.items += [None, None]
    factor = 0.0
    for i in range(2):
        factor = factor + (1.0 if model.items[i] is None else model.items[i])
        model.items[i] = mean(y) * (i + 1)
    return factor


def the_last_ones(model, y):
    model.recent.append(mean(y))
    return sum(model.recent)


def taken_out(model, y):
    if "h" in model.cache:
        return model.cache.pop("h")
    model.cache["h"] = mean(y)
    return 1.0


def moved_on(model, y):
    before = model.cache.get("previous", 1.0)
    if "current" in model.cache:
        model.cache["previous"] = model.cache["current"]
    model.cache["current"] = mean(y)
    return before


def in_place(model, y):
    if "h" not in model.cache:
        model.cache["h"] = torch.zeros(2).double()
    model.cache["h"] += mean(y)
    return model.cache["h"]


def reset_to_none(model, y):
    before = 3.0 if model.plain is None else model.plain
    model.plain = None
    return before


class Table(dict):
    pass


class Items(list):
    pass


def in_a_default_dictionary(model, y):
    factor = model.cache["h"] + model.cache["read"]
    model.cache["h"] = mean(y)
    return factor


def in_dictionaries_and_lists_of_its_own(model, y):
    table, items = model.own
    factor = items[0] * table.get("h", 1.0)
    items[0], table["h"] = mean(y), y.detach().exp().mean(0)
    return factor


def deleted(model, y):
    before = getattr(model, "plain", 3.0)
    if hasattr(model, "plain"):
        del model.plain
    return before


def cleared_and_filled(model, y):
    model.items.clear()
    model.items.extend([y, mean(y)])
    return 1.0


def a_new_list(model, y):
    model.items = []
    model.items.append(y)
    return 1.0


def a_flag(model, y):
    factor = 1.0 if model.state else 2.0
    model.state = True
    return factor


def a_count_without_use(model, y):
    model.cache["calls"] = model.cache.get("calls", 0) + 1
    model.items.append(3)
    return 1.0


def in_a_new_object(model, y):
    before = model.state.value if model.state else 1.0
    model.state = Record(mean(y))
    return before


def in_a_new_dictionary_of_its_own(model, y):
    before = model.state["h"] if model.state else 1.0
    model.state = Table(h=mean(y))
    return before


def in_a_distribution(model, y):
    """One of PyTorch's, whose tensors are those of the call."""
    before = model.state.mean if model.state else 1.0
    model.state = torch.distributions.Normal(mean(y), 2.0)
    return before


CARRIED = [
    in_a_dictionary, in_a_tuple, in_objects, in_a_list_of_places, the_last_ones, taken_out, moved_on, in_place,
    reset_to_none, deleted, cleared_and_filled, a_new_list, a_flag, in_dictionaries_and_lists_of_its_own,
    in_a_new_object, in_a_new_dictionary_of_its_own, in_a_distribution,
]  # fmt: skip


def tangents(model):
    return {name: torch.ones(1, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()}


def check_calls(model, shapes, compiled=False):
    reference, layer = copy.deepcopy(model), model.layer
    hd = fomoh_fx.transform(model)
    hd = fomoh_fx.compile(hd, backend="eager") if compiled else hd
    for rows in shapes:
        x = torch.randn(rows, 3, dtype=torch.float64)
        reference.layer.load_state_dict(layer.state_dict())
        out, expected = hd(x, tangents=tangents(model)), reference(x)
        gradients = torch.autograd.grad(expected, list(reference.parameters()), retain_graph=True)
        torch.testing.assert_close(out.primal, expected.detach())
        torch.testing.assert_close(out.tangent[0], sum(g.sum() for g in gradients))
        mine, its = map(flat, (model, reference))
        assert mine.keys() == its.keys()
        for key, value in its.items():
            torch.testing.assert_close(mine[key], value)
        with torch.no_grad():
            layer.bias += 0.1
    return hd


def flat(model):
    """What the model keeps by the place where it is."""
    found = {}

    def add(value, place):
        if isinstance(value, dict):
            found.update({(*place, key): "there" for key in value})
            for key, inner in value.items():
                add(inner, (*place, key))
        elif isinstance(value, (list, tuple, deque)):
            add(dict(enumerate(value)), place)
        elif isinstance(value, (Record, SimpleNamespace)):
            add(vars(value), place)
        elif isinstance(value, torch.Tensor):
            found[place] = value.detach()
        else:
            found[place] = str(value)

    for name in ("cache", "items", "recent", "state", "pair", "record", "plain", "own"):
        add(getattr(model, name, "missing"), (name,))
    return {
        place: value if isinstance(value, torch.Tensor) else torch.tensor([ord(c) for c in value])
        for place, value in found.items()
    }


@pytest.mark.parametrize("through_make_fx", [False, True], ids=["export", "make_fx"])
@pytest.mark.parametrize("change", CARRIED, ids=lambda change: change.__name__)
def test_later_calls_see_what_was_kept(change, through_make_fx):
    torch.manual_seed(0)
    check_calls(Keeps(change, through_make_fx), (4, 4, 5, 4))


@pytest.mark.parametrize("through_make_fx", [False, True], ids=["export", "make_fx"])
def test_a_key_that_a_default_dictionary_makes(through_make_fx):
    model = Keeps(in_a_default_dictionary, through_make_fx)
    model.cache = defaultdict(lambda: torch.ones(2).double())
    hd = check_calls(model, (4, 4, 4))
    assert len(hd._traced) == 2


@pytest.mark.parametrize("change", [in_a_dictionary, in_a_tuple, the_last_ones], ids=lambda change: change.__name__)
def test_lowered(change):
    torch.manual_seed(0)
    check_calls(Keeps(change), (4, 4, 4), compiled=True)


def test_a_trace_changes_nothing_and_containers_stay_the_same():
    for change in CARRIED:
        model = Keeps(change)
        before, kept = flat(model), vars(model).copy()
        fomoh_fx.transform(model).trace(torch.randn(4, 3).double(), tangents=tangents(model))
        after = flat(model)
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
        assert all(vars(model)[name] is value for name, value in kept.items())


def test_graphs_are_used_again():
    for change in (in_a_dictionary, in_a_tuple, moved_on, in_a_list_of_places):
        assert len(check_calls(Keeps(change), (4,) * 6)._traced) <= 3


def test_what_the_user_puts_there_between_calls():
    model, x = Keeps(in_a_dictionary), torch.randn(4, 3, dtype=torch.float64)
    hd = fomoh_fx.transform(model)
    for new in ({}, {"h": torch.full((2,), 3.0).double()}, {"h": torch.full((4, 1), 2.0).double()}, {}):
        reference = copy.deepcopy(model)
        model.cache, reference.cache = dict(new), dict(new)
        for _ in range(2):
            torch.testing.assert_close(hd(x, tangents=tangents(model)).primal, reference(x).detach())


def test_in_a_module_that_a_function_refers_to():
    model = Keeps(in_a_tuple)
    reference, x = copy.deepcopy(model), torch.randn(4, 3, dtype=torch.float64)
    hd = fomoh_fx.transform(lambda x: model(x), wrt="inputs")
    for _ in range(3):
        torch.testing.assert_close(hd(x, tangents=(torch.ones(1, 4, 3).double(),)).primal, reference(x).detach())


def test_a_cache_of_parameters_is_computed_anew():
    def table(model, y):
        if "table" not in model.cache:
            model.cache["table"] = model.layer.bias.exp()
        return model.cache["table"]

    model, x = Keeps(table), torch.randn(4, 3, dtype=torch.float64)
    hd = fomoh_fx.transform(model)
    for _ in range(3):
        out = hd(x, tangents=tangents(model))
        expected = Keeps(table)
        expected.layer = model.layer
        gradients = torch.autograd.grad(expected(x), list(model.parameters()))
        torch.testing.assert_close(out.tangent[0], sum(g.sum() for g in gradients))
        with torch.no_grad():
            model.layer.bias += 0.1


def test_a_count_that_nothing_depends_on_is_no_matter():
    model, x = Keeps(a_count_without_use), torch.randn(4, 3, dtype=torch.float64)
    hd, reference = fomoh_fx.transform(model), copy.deepcopy(model)
    for _ in range(3):
        torch.testing.assert_close(hd(x, tangents=tangents(model)).primal, reference(x).detach())


def counted(model, y):
    model.cache["calls"] = model.cache.get("calls", 0) + 1
    return model.cache["calls"]


def counted_in_a_list(model, y):
    model.items.append(y.shape[0])
    return float(len(model.items))


def grows(model, y):
    model.items.append(mean(y))
    return sum(model.items)


def with_its_derivative(model, y):
    before = model.cache.get("h", 1.0)
    model.cache["h"] = y.mean(0)
    return before


GLOBAL: list[torch.Tensor] = []
LAST = None


def in_a_global_list(model, y):
    GLOBAL.append(mean(y))
    return sum(GLOBAL)


def in_a_global_variable(model, y):
    global LAST
    before = 1.0 if LAST is None else LAST
    LAST = mean(y)
    return before


def in_a_closure():
    last = None

    def change(model, y):
        nonlocal last
        before = 1.0 if last is None else last
        last = mean(y)
        return before

    return change


REFUSED = {
    "count": (counted, "changes Keeps.cache.calls at every call"),
    "count-in-a-list": (counted_in_a_list, "changes Keeps.items at every call"),
    "grows": (grows, "its Keeps.items grows by tensors at every call"),
    "derivative": (with_its_derivative, "that an earlier call computed from the parameter 'layer.*detach it"),
    "global-list": (in_a_global_list, "the global variable .*GLOBAL, .*buffer"),
    "global-variable": (in_a_global_variable, "the global variable .*LAST, "),
    "closure": (in_a_closure(), "a variable of the function .*change, "),
}


@pytest.mark.parametrize("through_make_fx", [False, True], ids=["export", "make_fx"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, through_make_fx):
    change, message = REFUSED[name]
    GLOBAL.clear()
    model, x = Keeps(change, through_make_fx), torch.randn(4, 3, dtype=torch.float64)
    hd = fomoh_fx.transform(model)
    with pytest.raises(CaptureError, match=message):
        for _ in range(3):
            hd(x, tangents=tangents(model))
    assert not any(type(t) is not torch.Tensor for t in (*GLOBAL, *model.items))


@functools.lru_cache
def table(n):
    return torch.arange(n).double()


@functools.cache
def table_and_more(n):
    return {"table": (torch.arange(n).double(), n)}


def test_the_cache_of_a_function_has_no_tensor_of_the_tracer():
    model = Keeps(lambda model, y: table(2) + table_and_more(2)["table"][0])
    check_calls(model, (4, 4))
    assert type(table(2)) is type(table_and_more(2)["table"][0]) is torch.Tensor
    check_calls(model, (4,))


def test_hooks_that_a_model_installs_once():
    class Installs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.weight, self.installed = nn.Linear(3, 3), torch.ones(3), False

        def forward(self, x):
            if not self.installed:
                self.layer.register_forward_hook(lambda module, args, out: out * 2)
                self.installed = True
            return self.layer(x) * self.weight  # a tensor of its own, for which a model is captured twice

    model, x = Installs(), torch.randn(2, 3)
    hd, reference = fomoh_fx.transform(model), copy.deepcopy(model)
    for _ in range(3):
        torch.testing.assert_close(hd(x, tangents={"layer.bias": torch.ones(1, 3)}).primal, reference(x).detach())
    assert len(model.layer._forward_hooks) == 1


class CachedBesideAnAttribute(nn.Module):
    """The attribute, a tensor that no module registers, is met at a second attempt of capture."""

    def __init__(self):
        super().__init__()
        self.weight, self.mask = nn.Parameter(torch.ones(3).double()), None

    def forward(self, x):
        if self.mask is None:
            self.mask = 2 * torch.ones(3).double()
        return ((x * self.weight).sin() * table(3) * self.mask).sum()


def test_a_cached_function_beside_an_attribute():
    table.cache_clear()
    model = CachedBesideAnAttribute()
    hd, reference = fomoh_fx.transform(model), copy.deepcopy(model)
    for rows in (2, 2, 4):
        table.cache_clear()
        x = torch.randn(rows, 3).double()
        out = hd(x, tangents={"weight": torch.ones(1, 3).double()})
        torch.testing.assert_close(out.primal, reference(x).detach())
