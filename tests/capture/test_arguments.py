"""Arguments, targets and results that are objects; arguments in which a model leaves something."""

import collections
import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Normal

import fomoh_fx
from fomoh_fx.errors import CaptureError
from fomoh_fx.optim import FGD
from tests.models.checking import Problem

D = torch.float64


@dataclasses.dataclass
class Batch:
    x: object
    scale: float = 1.0
    count: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: object


class Dictionary(dict):
    pass


class Ordered(collections.OrderedDict):
    pass


class Defaults(collections.defaultdict):
    pass


class Items(list):
    pass


class Pair(tuple):
    pass


class User(collections.UserDict):
    pass


class Calls(nn.Module):
    """``compute`` is given the layer and the arguments."""

    def __init__(self, compute):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.compute = nn.Linear(2, 2).double(), compute

    def forward(self, *args):
        return self.compute(self.layer, *args)


def check(hd, model, make):
    """A call against reverse mode, both with arguments of their own; gives these."""
    ours, theirs = make(), make()
    tangents = {name: torch.randn_like(p)[None] for name, p in model.named_parameters()}
    out, loss = hd(*ours, tangents=tangents), model(*theirs)
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    slope = sum((g * t[0]).sum() for g, t in zip(gradients, tangents.values(), strict=True))
    torch.testing.assert_close(out.primal, loss.detach())
    torch.testing.assert_close(out.tangent[0], slope)
    return ours, theirs


BATCHES = {
    "dataclass": (Batch, lambda b: b.x),
    "frozen dataclass with slots": (Frozen, lambda b: b.x),
    "object": (lambda x: SimpleNamespace(x=[x]), lambda b: b.x[0]),
    "dictionary": (lambda x: Dictionary(x=x), lambda b: b["x"]),
    "ordered": (lambda x: Ordered(a=1.0, x=x), lambda b: [*b.values()][1]),
    "defaults": (lambda x: Defaults(list, x=x), lambda b: b["x"] if b["missing"] == [] else None),
    "user dictionary": (lambda x: User(x=x), lambda b: b["x"]),
    "list": (lambda x: Items([x, 3]), lambda b: b[0] * b[1]),
    "tuple": (lambda x: Pair((x, 3)), lambda b: b[0] * b[1]),
    "one in the other": (lambda x: Batch(Dictionary(x=Items([x]))), lambda b: b.x["x"][0]),
    "distribution": (lambda x: Normal(x, 2.0), lambda b: b.mean * b.stddev),
    "partial": (lambda x: functools.partial(torch.mul, x), lambda b: b(2)),
    "set": (lambda x: {x}, lambda b: sum(b)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_that_is_an_object(name):
    make, read = BATCHES[name]
    model = Calls(lambda layer, batch: layer(read(batch)).pow(3).sum())
    hd = fomoh_fx.transform(model)
    for x in torch.randn(3, 3, 2, dtype=D):
        check(hd, model, lambda x=x: (make(x),))


def test_an_object_among_the_targets():
    model = nn.Linear(2, 1).double()
    hd = fomoh_fx.transform(model, lambda output, target: (output - target.x).square().mean())
    x, optimizer = torch.randn(3, 2, dtype=D), FGD(hd, lr=0.0)
    for y in torch.randn(3, 3, 1, dtype=D):
        torch.testing.assert_close(optimizer.step(x, targets=(Batch(y),)), (model(x) - y).square().mean().detach())


def test_tangents_in_an_object():
    x, v = torch.randn(2, dtype=D), torch.randn(1, 2, dtype=D)
    out = fomoh_fx.transform(lambda b: b.x.sin().sum(), wrt="inputs")(Batch(x), tangents=(Batch(v),))
    torch.testing.assert_close(out.tangent, (x.cos() * v[0]).sum()[None])


def test_plain_fields_that_the_caller_changes():
    model = Calls(lambda layer, batch: layer(batch.x).sum() * batch.scale)
    hd, batch = fomoh_fx.transform(model), Batch(torch.ones(1, 2, dtype=D))
    for scale, x in ((1.0, batch.x), (5.0, batch.x), (5.0, 3 * batch.x)):
        batch.scale, batch.x = scale, x
        torch.testing.assert_close(check(hd, model, lambda: (batch,))[0][0].x, x)


def filled(layer, x, history, info):
    """A cache, and a count for the caller."""
    h = layer(x).tanh()
    history.append(h.detach())
    info["n"] = info.get("n", 0) + 1
    return (h * sum(history)).sum()


def taken(layer, x, history, info):
    info["x"] = x
    return layer(x).sum() * info.pop("scale", 1.0)


def set_in_an_object(layer, x, history, info):
    record = info["record"]
    record.count += 1
    record.x = layer(x).mean() + record.x
    return layer(x).sin().sum() * record.count


@pytest.mark.parametrize("compute", [filled, taken, set_in_an_object])
@pytest.mark.parametrize("through_make_fx", [False, True])
def test_what_a_model_leaves_in_its_arguments(compute, through_make_fx):
    def other(layer, x, *rest):
        again = torch.func.vmap(torch.func.grad(lambda t: t.sin().sum()))(x).sum() if through_make_fx else 0.0
        return compute(layer, x, *rest) + again

    model = Calls(other)
    hd = fomoh_fx.transform(model)
    ours, theirs = (([], {"scale": 2.0, "record": Batch(torch.ones(1, dtype=D))}) for _ in range(2))
    for x in torch.randn(3, 3, 2, dtype=D):
        out = hd(x, *ours, tangents={"layer.bias": torch.ones(1, 2, dtype=D)})
        torch.testing.assert_close(out.primal, model(x, *theirs).detach())
        assert ours[1].keys() == theirs[1].keys() and ours[1].get("n") == theirs[1].get("n")
        torch.testing.assert_close(ours[0], [h.detach() for h in theirs[0]])
        assert ours[1]["record"].count == theirs[1]["record"].count
        torch.testing.assert_close(ours[1]["record"].x, torch.as_tensor(theirs[1]["record"].x).detach())
        assert ours[1].get("x") is theirs[1].get("x")


def test_a_trace_leaves_nothing_in_arguments():
    history, info = [], {}
    model = Calls(filled)
    fomoh_fx.transform(model).trace(
        torch.ones(3, 2, dtype=D), history, info, tangents={"layer.bias": torch.ones(1, 2, dtype=D)}
    )
    assert (history, info) == ([], {})


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        (lambda: {1}, lambda a: a.add(2)),
        (lambda: bytearray(2), lambda a: a.__setitem__(0, 7)),
        (lambda: collections.OrderedDict(a=1, b=2), lambda a: a.move_to_end("a")),
    ],
    ids=["set", "bytes", "order"],
)
def test_what_has_no_place_is_refused_and_taken_back(argument, change):
    def compute(layer, x, given):
        change(given)
        return layer(x).sum()

    given = argument()
    with pytest.raises(CaptureError, match="that it changes among its arguments, .*return it"):
        fomoh_fx.transform(Calls(compute))(
            torch.ones(3, 2, dtype=D), given, tangents={"layer.bias": torch.ones(1, 2, dtype=D)}
        )
    assert given == argument() and list(given) == list(argument())


def test_an_iterator_among_the_arguments_is_refused():
    with pytest.raises(CaptureError, match="takes the next value of its argument"):
        fomoh_fx.grad(lambda x, steps: x.sin().sum() * next(steps))(torch.ones(2), iter([1.0, 2.0]))


RESULTS = {
    "dataclass": lambda h: Batch(h, 2.0),
    "frozen": lambda h: Frozen(h),
    "dictionary": lambda h: Dictionary(x=h),
    "list": lambda h: Items([h]),
    "distribution": lambda h: Normal(h, 1.0),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_that_is_an_object(name):
    model = Calls(lambda layer, x: (layer(x).sum(), RESULTS[name](layer(x))))
    x = torch.ones(1, 2, dtype=D)
    found = fomoh_fx.transform(model)(x, tangents={"layer.bias": torch.ones(1, 2, dtype=D)}).primal[1]
    expected = model(x)[1]
    ours, theirs = ([*v.values()] if isinstance(v, dict) else v if isinstance(v, list) else vars(v) if hasattr(
        v, "__dict__") else [v.x] for v in (found, expected))  # fmt: skip
    assert type(found) is type(expected)
    torch.testing.assert_close(
        [*ours.values()] if isinstance(ours, dict) else ours,
        [*theirs.values()] if isinstance(theirs, dict) else theirs,
        check_stride=False,
    ) if name != "distribution" else torch.testing.assert_close(found.loc, expected.loc.detach())


def tensors_of(result):
    own = vars(result) if hasattr(result, "__dict__") else {"x": getattr(result, "x", None)}
    inside = [*result.values()] if isinstance(result, dict) else result if isinstance(result, list) else own.values()
    return [x for x in inside if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("name", [name for name in RESULTS if name != "distribution"])
def test_the_plane_of_a_result_that_is_an_object(name):
    """As that of the same numbers in a tuple, by every name that a component has."""
    x, stacks = torch.ones(1, 2, dtype=D), torch.randn(2, 2, dtype=D)
    model = Calls(lambda layer, x: RESULTS[name](layer(x).square().sum(0)))
    plain = Calls(lambda layer, x: (layer(x).square().sum(0),))
    plain.load_state_dict(model.state_dict())
    found, expected = (fomoh_fx.transform(m)(x, tangents={"layer.bias": stacks}) for m in (model, plain))
    for part in (lambda v: v.hessian(), lambda v: v.eps1, lambda v: v.eps2, lambda v: v.eps1eps2):
        assert type(part(found)) is type(RESULTS[name](x))
        for ours, theirs in zip(tensors_of(part(found)), part(expected), strict=True):
            assert torch.equal(ours, theirs)


def test_an_output_that_the_loss_takes_apart():
    model = Calls(lambda layer, x: Categorical(logits=layer(x)))
    hd = fomoh_fx.transform(model, lambda policy, action: -policy.log_prob(action).mean())
    x, action = torch.randn(3, 2, dtype=D), torch.tensor([0, 1, 1])
    out = hd(x, tangents={"layer.bias": torch.ones(1, 2, dtype=D)}, targets=(action,))
    torch.testing.assert_close(out.output.logits, model(x).logits.detach())


def test_a_result_that_derivatives_cannot_make_is_refused():
    pack = nn.utils.rnn.pack_padded_sequence
    model = Calls(lambda layer, x: pack(layer(x)[None], [1], batch_first=True))
    with pytest.raises(CaptureError, match="cannot be made of derivatives.*return its tensors in a tuple"):
        fomoh_fx.transform(model)(torch.ones(1, 2, dtype=D), tangents={"layer.bias": torch.ones(1, 2, dtype=D)})


class Attributes(collections.OrderedDict):
    def __getattr__(self, name):
        return self[name]


def test_a_dictionary_whose_attributes_are_its_keys():
    model = Calls(lambda layer, x: Attributes(y=layer(x)))
    found = fomoh_fx.transform(model)(torch.ones(1, 2, dtype=D), tangents={"layer.bias": torch.ones(1, 2, dtype=D)})
    assert type(found.tangent) is Attributes
    assert torch.equal(found.tangent.y, torch.ones(1, 1, 2, dtype=D))


@pytest.mark.parametrize("make", [lambda h: {h}, lambda h: lambda: h], ids=["set", "function"])
def test_a_tensor_in_what_no_call_can_make_is_refused(make):
    model = Calls(lambda layer, x: (layer(x).sum(), make(layer(x))))
    with pytest.raises(CaptureError, match="returns a tensor inside a (set|function).*return it in a tuple"):
        fomoh_fx.transform(model)(torch.ones(1, 2, dtype=D), tangents={"layer.bias": torch.ones(1, 2, dtype=D)})


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_step_that_is_skipped_leaves_nothing_in_arguments():
    model = Calls(lambda layer, x, history: history.append(layer(x)) or layer(x).square().sum())
    optimizer, history = FGD(fomoh_fx.transform(model), lr=0.1), []
    optimizer.step(torch.full((3, 2), torch.nan, dtype=D), history)
    assert optimizer.skipped == 1 and history == []
    optimizer.step(torch.ones(3, 2, dtype=D), history)
    assert optimizer.skipped == 1 and len(history) == 1


def test_one_list_in_two_places_is_refused_where_it_is_changed():
    def compute(layer, x, history, same):
        history.append(layer(x).mean())
        return layer(x).sum() * len(same)

    model, history = Calls(compute), []
    x, tangents = torch.ones(3, 2, dtype=D), {"layer.bias": torch.ones(1, 2, dtype=D)}
    with pytest.raises(CaptureError, match="one list, dictionary or object in two places"):
        fomoh_fx.transform(model)(x, history, history, tangents=tangents)
    model.own = history
    with pytest.raises(CaptureError, match="or one that it has itself"):
        fomoh_fx.transform(model)(x, history, [1], tangents=tangents)
    assert history == []
    only_read = Calls(lambda layer, x, a, b: layer(x).sum() * len(a) * len(b))
    out = fomoh_fx.transform(only_read)(x, [1, 2], [3], tangents=tangents)
    torch.testing.assert_close(out.primal, only_read(x, [1, 2], [3]).detach())


@pytest.mark.parametrize("wrt", ["parameters", "inputs"])
@pytest.mark.parametrize("inside", [False, True])
def test_arguments_made_in_inference_mode(wrt: str, inside: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    problem = Problem(model, (x,), loss=nn.functional.cross_entropy, targets=(y,), wrt=wrt)
    hd, tangents = fomoh_fx.transform(model, problem.loss, wrt=wrt), problem.directions(2)
    with torch.inference_mode():
        given, labels = x.clone(), y.clone()
    with torch.inference_mode(inside):
        out = hd(given, tangents=tangents, targets=(labels,))
    expected = fomoh_fx.transform(model, problem.loss, wrt=wrt)(x, tangents=tangents, targets=(y,))
    assert len(hd._traced) == 1
    torch.testing.assert_close(out.tangent, expected.tangent)
    torch.testing.assert_close(out.hessian(), expected.hessian())
