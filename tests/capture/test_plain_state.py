"""Plain data that a model keeps in its attributes while it runs: the next call finds them, as in the model."""

import copy
import enum
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.containers import has_tensors
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


class Mode(enum.Enum):
    A = 1.0
    B = 2.0


def an_enumeration(model, x, step):
    before, model.kept = model.kept, Mode.B
    return before.value


def a_mean_of_lengths(model, x, step):
    """Counted while it trains, and read afterwards."""
    if not model.training:
        return model.total / model.kept
    model.kept += 1
    model.total += 3
    return 1.0


def oldest_key_dropped(model, x, step):
    model.kept[x.shape[0]] = step
    if len(model.kept) > 2:
        del model.kept[next(iter(model.kept))]
    return sum(model.kept.values())


def a_user_dictionary(model, x, step):
    before = model.kept.get("length", 2)
    model.kept["length"] = x.shape[0]
    return before


def a_log(model, x, step):
    """It grows, and what is computed depends on it only later."""
    model.kept.append(x.shape[0])
    return 1 / max(model.kept)


def lengths_seen(model, x, step):
    scale = 2.0 if x.shape[0] in model.kept else 1.0
    model.kept.add(x.shape[0])
    return scale


def in_an_array(model, x, step):
    if model.kept[0] == 0:
        model.kept[0] = x.shape[0]
    return float(model.kept[0])


def in_an_array_of_objects(model, x, step):
    if model.kept[1] is None:
        model.kept[1] = x.shape[0]
    return float(model.kept[1])


def in_bytes(model, x, step):
    model.kept[1] = max(model.kept[1], x.shape[0])
    return 1 / model.kept[1]


def in_a_set_in_a_dictionary(model, x, step):
    model.kept["lengths"].add(x.shape[0])
    return 1 / len(model.kept["lengths"])


def least_recently_used(model, x, step):
    """The order of its keys decides what is dropped."""
    length = x.shape[0]
    if length in model.kept:
        model.kept.move_to_end(length)
    else:
        model.kept[length] = 1 / length
        if len(model.kept) > 2:
            model.kept.popitem(last=False)
    return next(iter(model.kept.values()))


def the_last_lengths(model, x, step):
    model.kept.append(x.detach().mean())
    model.kept = model.kept[-2:]
    return sum(model.kept)


def by_turns(model, x, step):
    model.kept.move_to_end(next(iter(model.kept)))
    return next(iter(model.kept.values()))


def parity(model, x, step):
    model.kept ^= {1}
    return 1.0 + len(model.kept)


def every_third(model, x, step):
    model.kept = (model.kept + 1) % 3
    return 5.0 if model.kept == 0 else 1.0


def up_to_three(model, x, step):
    model.kept = min(model.kept + 1, 3)
    return 1 / model.kept


def one_module_of_two_names(model, x, step):
    return 2.0 if model.layer is model.same else 1.0


MODELS = {
    "enumeration": lambda: Keeps(an_enumeration, kept=Mode.A),
    "mean": lambda: Keeps(a_mean_of_lengths, kept=0, total=0),
    "oldest": lambda: Keeps(oldest_key_dropped, kept={}),
    "user dictionary": lambda: Keeps(a_user_dictionary, kept=UserDict()),
    "log": lambda: Keeps(a_log, kept=[9]),
    "set": lambda: Keeps(lengths_seen, kept=set()),
    "array": lambda: Keeps(in_an_array, kept=np.zeros(2)),
    "array of objects": lambda: Keeps(in_an_array_of_objects, kept=np.array([3, None], dtype=object)),
    "bytes": lambda: Keeps(in_bytes, kept=bytearray(2)),
    "set in a dictionary": lambda: Keeps(in_a_set_in_a_dictionary, kept={"lengths": {4}}),
    "order": lambda: Keeps(least_recently_used, kept=OrderedDict()),
    "last ones": lambda: Keeps(the_last_lengths, kept=[]),
    "by turns": lambda: Keeps(by_turns, kept=OrderedDict(a=1.0, b=2.0)),
    "parity": lambda: Keeps(parity, kept={1}),
    "every third": lambda: Keeps(every_third, kept=0),
    "up to three": lambda: Keeps(up_to_three, kept=0),
    "two names": lambda: with_two_names(Keeps(one_module_of_two_names)),
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


def with_two_names(model):
    model.same = model.layer
    return model


def data(model):
    return {name: value for name, value in vars(model).items() if name in ("kept", "table", "made", "total")}


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
        ours.train(length > 3)
        theirs.train(length > 3)

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
            if isinstance(kept, torch.Tensor) or has_tensors(kept):
                torch.testing.assert_close(kept, theirs_now[key])
            elif isinstance(kept, np.ndarray):
                assert kept.tolist() == theirs_now[key].tolist()
            else:
                assert kept == theirs_now[key] and type(kept) is type(theirs_now[key])


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


def test_a_count_that_nothing_depends_on_is_not_captured_again():
    def counted(model, x, step):
        model.kept += 1
        return 2.0

    model = Keeps(counted, kept=0)
    hd, x = fomoh_fx.transform(model), torch.randn(4, 3).double()
    for calls in range(1, 5):
        hd(x, tangents={"layer.bias": torch.ones(1, 2).double()})
        assert model.kept == calls
    assert len(hd._traced) == 1


def test_a_count_that_is_returned_is_refused():
    class Returns(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x), self.calls

    model = Returns(3, 2)
    model.calls = 0
    with pytest.raises(CaptureError, match="computes with it or returns it"):
        fomoh_fx.transform(model)(torch.randn(4, 3), tangents={"bias": torch.ones(1, 2)})


def test_a_hook_that_the_first_call_installs_is_installed_once():
    class Hooks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.handle = nn.Linear(3, 2), None

        def forward(self, x):
            if self.handle is None:
                self.handle = self.layer.register_forward_hook(lambda module, args, y: 2 * y)
            return self.layer(x)

    ours = Hooks()
    theirs = copy.deepcopy(ours)
    hd = fomoh_fx.transform(ours)
    for x in torch.randn(3, 4, 3):
        torch.testing.assert_close(hd(x, tangents={"layer.bias": torch.ones(1, 2)}).primal, theirs(x).detach())
        assert len(ours.layer._forward_hooks) == 1


@dataclass(slots=True)
class Slots:
    mean: object = None
    length: int = 0


def test_an_object_with_slots():
    """Its tensors and its plain data are there at the next call, and a graph is for its data."""

    def kept(model, x, step):
        before = model.kept.mean
        model.kept.mean = model.layer(x).detach().mean()
        model.kept.length = x.shape[0]
        return 1.0 if before is None else before

    ours = Keeps(kept, kept=Slots())
    theirs = copy.deepcopy(ours)
    hd = fomoh_fx.transform(ours)
    for length in (4, 4, 3):
        x = torch.randn(length, 3).double()
        out = hd(x, tangents={"layer.bias": torch.ones(1, 2).double()})
        torch.testing.assert_close(out.primal, theirs(x).detach())
        assert ours.kept.mean.equal(theirs.kept.mean) and ours.kept.length == length
    with_data = fomoh_fx.transform(Keeps(lambda model, x, step: float(model.kept.length), kept=Slots(length=2)))
    for length in (2, 5):
        with_data.model.kept.length = length
        out = with_data(x, tangents={"layer.bias": torch.ones(1, 2).double()})
        torch.testing.assert_close(out.primal, with_data.model(x).detach())


def test_a_tensor_kept_in_a_slot_of_a_function_is_refused_and_removed():
    kept = Slots()

    def model(x):
        kept.mean = x.detach().mean()
        return x.sin().sum()

    with pytest.raises(CaptureError, match="keeps a tensor that it computes in an object of type Slots"):
        fomoh_fx.grad(model)(torch.ones(3))
    assert kept.mean is None


def added_to_a_set(model, x, step):
    if not model.kept:
        model.kept.add(x.detach().mean())
    return sum(model.kept)


def put_in_an_array(model, x, step):
    model.kept[0] = x.detach().mean()
    return model.kept[0]


@pytest.mark.parametrize(
    ("keep", "kept"), [(added_to_a_set, set()), (put_in_an_array, np.array([None], dtype=object))], ids=["set", "array"]
)
def test_a_tensor_kept_in_what_has_no_places_is_refused_and_removed(keep, kept):
    model, before = Keeps(keep, kept=kept), kept.copy()
    with pytest.raises(CaptureError, match="keeps a tensor that it computes in a (set|ndarray)"):
        fomoh_fx.transform(model)(torch.ones(2, 3).double(), tangents={"layer.weight": torch.ones(1, 2, 3).double()})
    assert model.kept is kept and list(kept) == list(before)


def test_data_that_take_ever_new_values_are_refused():
    def longer(model, x, step):
        model.kept.add(len(model.kept))
        return 1 / len(model.kept)

    model = Keeps(longer, kept={0})
    with pytest.raises(CaptureError, match="changes Keeps.kept at every call"):
        fomoh_fx.transform(model)(torch.ones(2, 3).double(), tangents={"layer.weight": torch.ones(1, 2, 3).double()})
    assert model.kept == {0}


def test_a_whole_number_that_becomes_one_with_a_point_is_another():
    def kept(model, x, step):
        before, model.kept = model.kept, 1.0
        return 2.0 if isinstance(before, int) else 1.0

    ours = Keeps(kept, kept=1)
    theirs, hd = copy.deepcopy(ours), fomoh_fx.transform(ours)
    for _ in range(3):
        x = torch.randn(4, 3).double()
        torch.testing.assert_close(hd(x, tangents={"layer.bias": torch.ones(1, 2).double()}).primal, theirs(x).detach())


def test_a_graph_that_read_nothing_there_is_not_that_of_a_count():
    """What one mode counts up, another reads: also where the user has reset it."""

    def kept(model, x, step):
        if not model.training:
            return 1.0 if model.kept is None else model.kept
        model.kept = (model.kept or 0) + 1
        return 2.0

    ours = Keeps(kept, kept=0)
    theirs, hd = copy.deepcopy(ours), fomoh_fx.transform(ours)
    for training, reset in ((True, False), (True, False), (False, True), (True, False), (True, False), (False, False)):
        for model in (ours, theirs):
            model.train(training)
            model.kept = None if reset else model.kept
        x = torch.randn(4, 3).double()
        torch.testing.assert_close(hd(x, tangents={"layer.bias": torch.ones(1, 2).double()}).primal, theirs(x).detach())
        assert ours.kept == theirs.kept


def test_containers_that_have_themselves():
    model = Keeps(lambda model, x, step: 2.0)
    model.log, model.table = [], {}
    model.log.append(model.log)
    model.table["self"] = model.table
    x = torch.randn(2, 3).double()
    out = fomoh_fx.transform(model)(x, tangents={"layer.bias": torch.ones(1, 2).double()})
    torch.testing.assert_close(out.primal, model(x).detach())
