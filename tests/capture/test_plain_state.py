"""Plain data that a model keeps in its attributes while it runs: the next call finds them, as in the model."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import CaptureError
from tests.oracle import reverse_over_reverse


class Keeps(nn.Module):
    """What it keeps between its calls is in ``scale``, which returns a number or tensor to multiply by."""

    def __init__(self, scale, **state):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 2).double(), scale
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, x, step=1.0):
        return (self.layer(x) * self.scale(self, x, step)).sin().sum()


def from_the_first_batch(model, x, step):
    if model.kept is None:
        model.kept = 1 / x.shape[0]
    return model.kept


def at_the_first_call(model, x, step):
    scale = 7.0 if model.kept else 1.0
    model.kept = 1
    return scale


def longest(model, x, step):
    model.kept = max(model.kept, x.shape[0])
    return 1 / model.kept


def smallest_float(model, x, step):
    model.kept = min(model.kept, x.shape[0] / 2)
    return model.kept


def last_argument(model, x, step):
    ratio = step / model.kept
    model.kept = step
    return ratio


def last_shape(model, x, step):
    before, model.kept = model.kept, x.shape
    return 1.0 if before is None else before[0] * 0.5


def an_attribute_of_its_own(model, x, step):
    if not hasattr(model, "made"):
        model.made = x.shape[0]
    return model.made


def deleted(model, x, step):
    if hasattr(model, "kept"):
        del model.kept
        return 2.0
    return 1.0


def in_a_dictionary(model, x, step):
    model.kept["longest"] = max(model.kept.get("longest", 0), x.shape[0])
    return 1 / model.kept["longest"]


def in_a_list(model, x, step):
    before = model.kept[0]
    model.kept[0] = x.shape[0]
    return before


def in_another_list(model, x, step):
    before = sum(model.kept)
    model.kept.append(x.shape[0])
    model.kept = model.kept[-1:]
    return before


def in_an_object(model, x, step):
    before, model.kept.length = model.kept.length, x.shape[0]
    return before


def a_name(model, x, step):
    before, model.kept = model.kept, "even" if x.shape[0] % 2 == 0 else "odd"
    return {"": 1.0, "even": 2.0, "odd": 3.0}[before]


def a_table_that_grows(model, x, step):
    if x.shape[0] > model.kept:
        model.table, model.kept = torch.arange(1.0, 1 + x.shape[0]).double(), x.shape[0]
    return model.table[: x.shape[0]].unsqueeze(1)


def a_buffer_that_grows(model, x, step):
    if model.table is None or x.shape[0] > len(model.table):
        model.table = torch.arange(1.0, 1 + x.shape[0]).double()
        model.kept = x.shape[0]
    return model.table[: x.shape[0]].unsqueeze(1) / model.kept


def one_only_beside_a_tensor(model, x, step):
    """Counts as long as there is no table, so that the second call has one, and every later one the same."""
    if model.table is None:
        model.table, model.kept = torch.ones(2).double(), model.kept + 1
        return 1.0
    return model.table * model.kept * 3


MODELS = {
    "first batch": lambda: Keeps(from_the_first_batch, kept=None),
    "first call": lambda: Keeps(at_the_first_call, kept=0),
    "longest": lambda: Keeps(longest, kept=0),
    "smallest": lambda: Keeps(smallest_float, kept=9.0),
    "last argument": lambda: Keeps(last_argument, kept=1.0),
    "last shape": lambda: Keeps(last_shape, kept=None),
    "own attribute": lambda: Keeps(an_attribute_of_its_own),
    "deleted": lambda: Keeps(deleted, kept=3),
    "dictionary": lambda: Keeps(in_a_dictionary, kept={}),
    "list": lambda: Keeps(in_a_list, kept=[2]),
    "another list": lambda: Keeps(in_another_list, kept=[2]),
    "object": lambda: Keeps(in_an_object, kept=SimpleNamespace(length=2)),
    "name": lambda: Keeps(a_name, kept=""),
    "table": lambda: Keeps(a_table_that_grows, kept=0, table=None),
    "buffer": lambda: Keeps(a_buffer_that_grows, kept=0, table=None),
    "beside a tensor": lambda: Keeps(one_only_beside_a_tensor, kept=0, table=None),
}


def data(model):
    return {name: value for name, value in vars(model).items() if name in ("kept", "table", "made")}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_there_at_the_next_call(name):
    torch.manual_seed(0)
    ours = MODELS[name]()
    theirs = copy.deepcopy(ours)
    hd = fomoh_fx.transform(ours)
    weight = ours.layer.weight
    v = torch.randn(2, *weight.shape).double()
    for length, step in ((4, 1.0), (6, 0.5), (6, 0.5), (3, 0.25), (3, 0.25), (8, 2.0), (4, 1.0)):
        x = torch.randn(length, 3).double()

        def function(w, x=x, step=step):
            return torch.func.functional_call(copy.deepcopy(theirs), {"layer.weight": w}, (x, step))

        value, tangent, cross = reverse_over_reverse(function, [weight], [v])
        theirs(x, step)
        out = hd(x, step, tangents={"layer.weight": v})
        torch.testing.assert_close(out.primal, value)
        torch.testing.assert_close(out.tangent, tangent)
        torch.testing.assert_close(out.hessian(), cross)
        ours_now, theirs_now = data(ours), data(theirs)
        assert ours_now.keys() == theirs_now.keys()
        for key, kept in ours_now.items():
            torch.testing.assert_close(kept, theirs_now[key]) if key == "table" else None
            assert key == "table" or kept == theirs_now[key]


def test_what_does_not_matter_is_not_compiled_again():
    """The second call finds another attribute, and the same graph."""
    model = Keeps(longest, kept=0)
    model.scale = lambda model, x, step: longest(model, x, step) * 0 + 2
    hd, x = fomoh_fx.transform(model), torch.randn(4, 3).double()
    for _ in range(3):
        hd(x, tangents={"layer.bias": torch.ones(1, 2).double()})
    first, second = hd._traced
    assert first.run is second.run
    assert model.kept == 4


def test_what_matters_is_compiled_again():
    hd, x = fomoh_fx.transform(Keeps(at_the_first_call, kept=0)), torch.randn(4, 3).double()
    for _ in range(3):
        hd(x, tangents={"layer.bias": torch.ones(1, 2).double()})
    first, second = hd._traced
    assert first.run is not second.run


BATCH = torch.export.Dim("batch", min=2)


def test_a_dynamic_size_that_later_calls_find_is_refused():
    v = {"layer.bias": torch.ones(1, 2).double()}
    for scale, kept in ((from_the_first_batch, None), (longest, 0), (in_a_list, [2]), (last_shape, None)):
        hd = fomoh_fx.transform(Keeps(scale, kept=kept))
        with pytest.raises(CaptureError, match="Keeps.kept"):
            hd.trace(torch.randn(4, 3).double(), tangents=v, dynamic_shapes={"x": {0: BATCH}})


def test_a_dynamic_size_that_is_written_before_it_is_read_is_served():
    def shape_of_this_call(model, x, step):
        model.kept, model.made = x.shape, x.shape[0]
        return model.kept[0] + model.made

    model = Keeps(shape_of_this_call, kept=None, made=0)
    hd, v = fomoh_fx.transform(model), {"layer.bias": torch.ones(1, 2).double()}
    hd.trace(torch.randn(4, 3).double(), tangents=v, dynamic_shapes={"x": {0: BATCH}})
    for length in (4, 7, 3):
        x = torch.randn(length, 3).double()
        torch.testing.assert_close(hd(x, tangents=v).primal, copy.deepcopy(model)(x).detach())
    assert len(hd._traced) == 1
