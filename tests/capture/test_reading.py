"""What a signature reads of values: what differs for a model differs here, and what is alike does not."""

import enum
import functools
import types
from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.capture.reading import Reader


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass
class Config:
    scale: float = 1.0
    inner: object = None


class Pair(tuple):
    """Two values that say that they have no length, as e3nn's irreducible representations do."""

    def __len__(self):
        raise NotImplementedError


class Holder:
    """An object that refers to what is no data, as a trainer does."""

    def __init__(self):
        self.steps, self.stream = 0, torch.Generator()


def method(self):
    return 1


def other_method(self):
    return 2


OWNER = nn.Identity()
TENSOR = torch.ones(2)
NAN = float("nan")

DIFFERENT = {
    "negative zero": (0.0, -0.0),
    "negative zero in a list": ([1.0, 0.0], [1.0, -0.0]),
    "types": (1, True),
    "types in a list": ([1, 1], [1, 1.0]),
    "complex": (2j, 5j),
    "tuple": ((2,), (3,)),
    "size": (torch.Size([2]), (2,)),
    "list": ([2], [3]),
    "dict": ({"k": 2}, {"k": 3}),
    "keys": ({"k": 2}, {"q": 2}),
    "order": (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)),
    "set": ({1}, {1, 2}),
    "deque": (deque([1], maxlen=2), deque([1], maxlen=3)),
    "nested": ({"k": [(1, {"q": 2})]}, {"k": [(1, {"q": 3})]}),
    "dtype": (torch.float32, torch.bfloat16),
    "enum": (Colour.RED, Colour.BLUE),
    "class": (nn.Tanh, nn.Sigmoid),
    "function": (torch.sin, torch.cos),
    "method": (types.MethodType(method, OWNER), types.MethodType(other_method, OWNER)),
    "owner": (types.MethodType(method, OWNER), types.MethodType(method, nn.Identity())),
    "partial": (functools.partial(torch.mul, other=2), functools.partial(torch.mul, other=5)),
    "module in a list": ([nn.Tanh()], [nn.Tanh()]),
    "numpy scalar": (np.float64(2), np.float64(5)),
    "numpy array": (np.array([2.0]), np.array([3.0])),
    "object": (Config(1.0), Config(2.0)),
    "object in an object": (Config(inner=Config(1.0)), Config(inner=Config(2.0))),
    "slice": (slice(0, 1), slice(0, 2)),
    "requires_grad": ([torch.ones(2)], [torch.ones(2, requires_grad=True)]),
    "shape": ([torch.ones(2)], [torch.ones(3)]),
    "one tensor twice": ([TENSOR, TENSOR], [TENSOR, torch.ones(2)]),
}


def read(value):
    reader = Reader()
    values = reader.value(value)
    hash(values)
    return values, reader.kept


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs(name):
    one, other = DIFFERENT[name]
    assert read(one)[0] != read(other)[0]
    assert read(one)[0] == read(one)[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: [1, 2.5, "a", None, NAN],
        lambda: float("nan"),
        lambda: {"k": ([1], (2, {3}))},
        lambda: Config(2.0, Config(inner=[1])),
        lambda: functools.partial(torch.mul, other=[2.0]),
        lambda: types.MethodType(method, OWNER),
        lambda: np.arange(3.0),
        lambda: [torch.ones(2), {"k": torch.zeros(2, 3)}],
        lambda: slice(0, None),
        lambda: Pair((3, "1o")),
        lambda: nn.Linear(2, 2).weight,
    ],
)
def test_what_is_alike(make):
    assert read(make())[0] == read(make())[0]


def test_what_refers_to_other_things_than_data_counts_by_identity():
    holder = Holder()
    before, kept = read([holder, holder])
    holder.steps += 1
    assert read([holder, holder])[0] == before and kept[0] is holder
    assert read([Holder(), holder])[0] != before


def test_what_is_in_itself():
    items = [1]
    items.append({"self": items})
    node = Config(inner=items)
    items.append(node)
    before, _ = read(node)
    assert read(node)[0] == before
    items[0] = 2
    assert read(node)[0] != before


def test_what_is_too_much_counts_by_identity():
    many = Config(inner=[[i] for i in range(20_000)])
    assert read(many)[1] == [many]
    chain = None
    for _ in range(5_000):
        chain = Config(inner=chain)
    assert read(chain)[1] == [chain]


def test_what_counts_by_identity_is_kept_alive():
    assert OWNER in read(types.MethodType(method, OWNER))[1]


class Weighted:
    """A model or a loss that is an object, and no module."""

    def __init__(self):
        self.weight = torch.ones(3)

    def __call__(self, x, y=0.0):
        return (self.weight * (x - y) ** 2).mean()


@pytest.mark.parametrize("how", ["object", "method", "partial"])
@pytest.mark.parametrize("is_loss", [False, True])
def test_a_tensor_of_an_object_that_is_called_may_be_replaced(how, is_loss):
    weighted = Weighted()
    function = {
        "object": weighted,
        "method": weighted.__call__,
        "partial": functools.partial(lambda owner, x, y=0.0: owner(x, y), weighted),
    }[how]
    x, v = torch.randn(3), torch.randn(1, 3)
    if is_loss:
        hd, targets = fomoh_fx.transform(lambda x: x * 2, function, wrt="inputs"), (0.0,)
    else:
        hd, targets = fomoh_fx.transform(function, wrt="inputs"), None
    for scale in (1.0, 5.0):
        weighted.weight = torch.full((3,), scale)
        out = hd(x, tangents=(v,), targets=targets)
        torch.testing.assert_close(out.primal, function(2 * x if is_loss else x))


def made_classes():
    """A class and its base, new ones for each test, for a test changes them."""

    class Base(nn.Module):
        scale = 2.0

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    class Derived(Base):
        power = 2

        @property
        def offset(self):
            return 1.0

        def activate(self, x):
            return x.sin()

        def forward(self, x, times=1.0):
            return (self.activate(x * self.weight) ** self.power * self.scale * times + self.offset).sum()

    return Derived, Base


def other_activate(self, x):
    return x.exp()


def other_forward(self, x, times=3.0):
    return self.activate(x * self.weight).sum() * times


CLASS_CHANGES = {
    "a value": lambda kind, base: setattr(kind, "power", 3),
    "a value of its base": lambda kind, base: setattr(base, "scale", 5.0),
    "a value that hides its base's": lambda kind, base: setattr(kind, "scale", 5.0),
    "a method": lambda kind, base: setattr(kind, "activate", other_activate),
    "a property": lambda kind, base: setattr(kind, "offset", property(lambda self: 7.0)),
    "forward": lambda kind, base: setattr(kind, "forward", other_forward),
    "a function's code": lambda kind, base: setattr(kind.activate, "__code__", other_activate.__code__),
    "a function's defaults": lambda kind, base: setattr(kind.forward, "__defaults__", (4.0,)),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("change", CLASS_CHANGES)
def test_a_class_that_is_changed(change, inside):
    kind, base = made_classes()
    model = nn.Sequential(kind()) if inside else kind()
    hd = fomoh_fx.transform(model)
    x, v = torch.linspace(0, 1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    tangents = {"0.weight" if inside else "weight": v}
    for count in (1, 2):
        for _ in range(2):
            torch.testing.assert_close(hd(x, tangents=tangents).primal, model(x).detach(), rtol=1e-14, atol=0)
        assert len(hd._traced) == count
        if count == 1:
            CLASS_CHANGES[change](kind, base)
