"""What repeats becomes calls of one region, and computes what it did."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fomoh_fx
from fomoh_fx.passes import outline as under_test
from fomoh_fx.passes.outline import outline
from fomoh_fx.passes.pipeline import copy_of

WIDTH = 4


class Layer(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(torch.tanh(self.up(self.norm(x)))))


def deep(depth, **options):
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, 3)
    return nn.Sequential(nn.Linear(5, WIDTH), *(Layer(**options) for _ in range(depth)), head).double()


def arguments(model, directions=2):
    tangents = {n: torch.randn(directions, *p.shape, dtype=p.dtype) for n, p in model.named_parameters()}
    x, targets = torch.randn(7, 5, dtype=torch.float64), torch.randint(3, (7,))
    return {"x": x, "tangents": tangents, "targets": (targets,)}


def calls(module):
    """The regions that the graph calls, one entry for each call."""
    return [n.target for n in module.graph.nodes if getattr(n.target, "__name__", None) == "region"]


def outlined(function, *inputs):
    """How often each region of the function's graph runs; the result must be the same."""
    module = make_fx(lambda *xs: tuple(function(*xs)), tracing_mode="fake")(*inputs)
    torch.manual_seed(0)
    expected = module(*inputs)
    module = outline(module)
    module.graph.lint()
    torch.manual_seed(0)
    for actual, value in zip(module(*inputs), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=0, atol=0)
    found = calls(module)
    return sorted(found.count(region) for region in dict.fromkeys(found))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Regions short enough for functions that one can read."""
    monkeypatch.setattr(under_test, "LEAST_NODES", 4)


X = torch.randn(3, 3)


def block(x, w):
    return (x @ w).sin() + x.cos()


def test_a_chain_of_equal_blocks():
    def function(x, *weights):
        for w in weights:
            x = block(x, w)
        return [x]

    assert outlined(function, X, *torch.randn(5, 3, 3).unbind()) == [5]


def test_too_few_or_too_short_stay():
    def function(x, *weights):
        for w in weights:
            x = block(x, w)
        return [x]

    assert outlined(function, X, *torch.randn(2, 3, 3).unbind()) == []
    assert outlined(lambda x: [x.sin().cos().sin().cos().sin().cos()], X) == []


def test_blocks_of_other_constants_or_sizes_are_others():
    def constants(x):
        for i in range(6):
            x = (x * (i + 2)).sin() + x.cos()
        return [x]

    def sizes(x):
        for _ in range(6):
            x = torch.cat([x.sin().cos().exp(), x[:1].tanh()])
        return [x]

    assert outlined(constants, X) == [] and outlined(sizes, X) == []


def test_two_kinds_of_blocks():
    def function(x, *weights):
        for w in weights[:4]:
            x = block(x, w)
        for w in weights[4:]:
            x = (x.exp() / (1 + x.exp()) @ w).tanh() - x
        return [x]

    assert outlined(function, X, *torch.randn(7, 3, 3).unbind()) == [3, 4]


def test_a_second_kind_takes_several_values_of_the_first():
    """Which one call returns: they share no memory."""

    def function(x, *weights):
        y = x.exp()
        for w in weights[:4]:
            x, y = block(x, w), (y @ w).cos() * x
        for w in weights[4:]:
            x, y = (x.exp() / (1 + y.exp()) @ w).tanh() - x, y * x.sigmoid()
        return [x, y]

    assert outlined(function, X, *torch.randn(7, 3, 3).unbind()) == [3, 4]


def test_what_blocks_share_and_what_is_used_later():
    """A value from before all blocks, one of every block that the graph returns, one of the block before the last."""

    def function(x, *weights):
        mask, seen, last = x.sigmoid(), [], x
        for w in weights:
            x, last = block(x, w) * mask + last, x
            seen.append(x.sum())
        return [x, *seen]

    assert outlined(function, X, *torch.randn(6, 3, 3).unbind())[-1] >= 4


def test_a_first_block_that_computes_what_the_others_take():
    def function(x, *weights):
        mask = None
        for w in weights:
            x = block(x, w)
            mask = x.sigmoid() if mask is None else mask
            x = x * mask
        return [x]

    assert outlined(function, X, *torch.randn(6, 3, 3).unbind())[-1] >= 4


def test_a_value_that_two_places_take_in_one_run_only():
    """The first block takes ``a`` twice, and is not a run of the region."""

    def function(x, a, b, c):
        for v, w in ((a, a), (b, c), (c, b), (a, b)):
            x = (x @ v).sin() + (x @ w).cos() + x
        return [x]

    assert outlined(function, X, *torch.randn(3, 3, 3).unbind()) == [3]


def test_every_run_draws_its_own_numbers():
    def function(x):
        for _ in range(5):
            x = nn.functional.dropout(x.sin() + x.cos() * x.exp(), 0.5)
        return [x]

    assert outlined(function, torch.randn(50)) == [5]


def test_no_region_returns_shared_memory():
    """Wherever such blocks are cut, a run would return a view of what it takes, so that they are not."""

    def function(x, *weights):
        seen = []
        for w in weights:
            seen.append(w.mT)
            x = block(x, w.mT)
        return [x, *seen]

    for region in calls(outline(make_fx(lambda *xs: tuple(function(*xs)))(X, *torch.randn(4, 3, 3).unbind()))):
        values = region(None, *torch.randn(9, 3, 3).unbind())
        assert len({v.untyped_storage().data_ptr() for v in values}) == len(values)
    assert outlined(function, X, *torch.randn(4, 3, 3).unbind()) in ([], [3], [4])


def test_runs_begin_where_the_fewest_numbers_pass():
    """Layers meet at the residual stream: a primal, its tangents and its cross components."""
    model = deep(6)
    hd = fomoh_fx.transform(model, nn.functional.cross_entropy)
    given = arguments(model)
    hd.trace(given.pop("x"), **given)
    module = outline(copy_of(hd.stages["eliminate"]))
    regions = calls(module)
    assert len(set(regions)) == 1 and len(regions) >= 5
    runs = [n for n in module.graph.nodes if n.target is regions[0]]
    assert [tuple(v.shape) for v in runs[0].meta["val"]] == [(7, WIDTH), (2, 7, WIDTH), (3, 7, WIDTH)]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace", None])
def test_the_final_graph_computes_what_it_did(second_order):
    model = deep(4)
    hd = fomoh_fx.transform(model, nn.functional.cross_entropy, second_order=second_order)
    given = arguments(model)
    x = given.pop("x")
    expected = hd(x, **given)
    module = copy_of(hd.latest.compiled.final)
    assert calls(outline(module))
    hd.latest.run = module
    actual = hd(x, **given)
    assert [n for n in hd.latest.compiled.final.graph.nodes if n.target in calls(module)] == []
    for part in ("primal", "tangent", "cross"):
        if getattr(expected, part) is not None:
            torch.testing.assert_close(getattr(actual, part), getattr(expected, part), rtol=0, atol=0)


def compile_and_compare(model, monkeypatch, **options):
    """The number of regions that Inductor compiled for the model; the result must be that of eager mode."""
    lowered = []
    body = under_test._body
    monkeypatch.setattr(under_test, "_body", lambda found: lowered.append(found) or body(found))
    hd = fomoh_fx.transform(model, nn.functional.cross_entropy)
    given = arguments(model)
    x = given.pop("x")
    torch.manual_seed(1)
    expected = hd(x, **given)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = fomoh_fx.compile(hd, **options)
        torch.manual_seed(1)
        actual = compiled(x, **given)
    for part in ("primal", "tangent", "cross"):
        torch.testing.assert_close(getattr(actual, part), getattr(expected, part))
    return [len(found.stretches) for found in lowered]


def test_blocks_that_take_two_parts_of_one_tensor_stay():
    """Dynamo takes no two operands that share memory."""

    def function(x, w):
        for a, b in zip(w.split(3)[:4], w.split(3)[4:], strict=True):
            x = (x @ a).sin() + (x @ b).cos() + x
        return [x]

    assert outlined(function, X, torch.randn(24, 3)) == []


def test_tangents_that_are_parts_of_one_vector():
    model = deep(4)
    given = arguments(model)
    x, tangents = given.pop("x"), given.pop("tangents")
    parts = torch.cat([v.flatten() for v in tangents.values()]).split([v.numel() for v in tangents.values()])
    tangents = {name: part.view_as(tangents[name]) for name, part in zip(tangents, parts, strict=True)}
    hd = fomoh_fx.transform(model, nn.functional.cross_entropy)
    expected = hd(x, tangents=tangents, **given)
    actual = fomoh_fx.compile(hd, backend="aot_eager")(x, tangents=tangents, **given)
    torch.testing.assert_close(actual.cross, expected.cross)


@pytest.mark.slow
def test_compiled(monkeypatch):
    """With Inductor's random numbers in every run its own."""
    assert compile_and_compare(deep(4, dropout=0.4), monkeypatch)[-1] >= 3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_backends(monkeypatch, backend):
    assert compile_and_compare(deep(4), monkeypatch, backend=backend)[-1] >= 3


def test_runs_whose_parameters_differ_in_what_is_trained(monkeypatch):
    """Dynamo cannot tell that these are alike but by tracing each, and gives up after eight unless it is told."""
    model = deep(11)
    for number, layer in enumerate(model[1:-1]):
        for bit, parameter in enumerate(layer.parameters()):
            parameter.requires_grad_(bool(number >> bit & 1))
    hd = fomoh_fx.transform(model, lambda y: y.square().sum(), wrt="inputs")
    x, v = torch.randn(7, 5, dtype=torch.float64), torch.randn(2, 7, 5, dtype=torch.float64)
    expected, actual = hd(x, tangents=(v,)), fomoh_fx.compile(hd, backend="aot_eager")(x, tangents=(v,))
    torch.testing.assert_close(actual.cross, expected.cross)


def test_dynamic_sizes_compile_every_layer():
    model = deep(4)
    compiled = fomoh_fx.compile(fomoh_fx.transform(model, nn.functional.cross_entropy), backend="aot_eager")
    eager = fomoh_fx.transform(model, nn.functional.cross_entropy)
    given = arguments(model)
    for batch in (7, 4):
        x, targets = torch.randn(batch, 5, dtype=torch.float64), torch.randint(3, (batch,))
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(targets, 0)
        call = {"tangents": given["tangents"], "targets": (targets,)}
        torch.testing.assert_close(compiled(x, **call).cross, eager(x, **call).cross)
