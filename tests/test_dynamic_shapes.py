"""Dynamic dimensions: how they are given, what a trace with them serves, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import fomoh_fx
from fomoh_fx.errors import ArgumentError, CaptureError, SpecialisationError
from tests.models.checking import Problem, check_call
from tests.oracle import reverse_over_reverse

BATCH = Dim("batch", min=2, max=64)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x * y.sin()).sum()


def traced(function, *args, dynamic_shapes):
    hd = fomoh_fx.transform(function, wrt="inputs")
    hd.trace(*args, tangents=tuple(r(2, *x.shape) for x in args), dynamic_shapes=dynamic_shapes)
    return hd


def serves(hd, *args) -> bool:
    """Whether a call with these arguments needs no other trace."""
    before = hd.latest
    hd(*args, tangents=tuple(r(2, *x.shape) for x in args))
    return hd.latest is before


@pytest.mark.parametrize(
    "dynamic_shapes",
    [
        {"x": {0: BATCH}, "y": {0: BATCH}},
        {"x": {0: Dim.DYNAMIC}, "y": [Dim.AUTO, None]},
        ({0: Dim.AUTO}, (Dim.AUTO, Dim.STATIC)),
        [{0: Dim.DYNAMIC, 1: 3}, {0: Dim.DYNAMIC}, ()],
    ],
    ids=["mapping", "hints", "sequence", "with targets"],
)
def test_given_as_to_export(dynamic_shapes):
    hd = traced(product, r(4, 3), r(4, 3), dynamic_shapes=dynamic_shapes)
    assert serves(hd, r(3, 3), r(3, 3)) and serves(hd, r(5, 3), r(5, 3))
    assert not serves(hd, r(4, 2), r(4, 2))


@pytest.mark.parametrize(
    ("dynamic_shapes", "message"),
    [
        ({"z": {0: BATCH}}, "no argument 'z'; there are x, y"),
        ("batch", "expected a mapping"),
        (({0: BATCH},), "1 entries for 2 positional arguments"),
        ({"x": Dim.DYNAMIC}, "argument 'x': expected {dimension: Dim}"),
        ({"x": (BATCH,)}, "argument 'x': 1 entries for a tensor of 2 dimensions"),
        ({"x": {2: BATCH}}, "argument 'x': a tensor of 2 dimensions has no dimension 2"),
        ({"x": {0: "batch"}}, "argument 'x': dimension 0 has size 4; expected a torch.export.Dim"),
        ({"x": {0: 7}}, "argument 'x': dimension 0 has size 4"),
        ({"x": [{0: BATCH}, None]}, "argument 'x': a tensor of 2 dimensions|argument 'x': dimension 0"),
    ],
)
def test_an_entry_that_does_not_fit_names_its_argument(dynamic_shapes, message):
    with pytest.raises(ArgumentError, match=f"^dynamic_shapes: .*{message}"):
        traced(product, r(4, 3), r(4, 3), dynamic_shapes=dynamic_shapes)


def test_a_dimension_that_the_model_fixes():
    x, y = r(4, 3), r(4, 3)
    with pytest.raises(CaptureError, match="(?s)^dynamic_shapes: .*dimension 0 of x .*constant"):
        traced(product, x, y, dynamic_shapes={"x": {0: Dim.DYNAMIC}})
    assert not vars(x)  # no mark of a dynamic dimension stays behind
    hd = traced(product, x, y, dynamic_shapes={"x": {0: Dim.AUTO}})  # may turn out fixed
    assert serves(hd, x, y) and not serves(hd, r(5, 3), r(5, 3))


def test_a_dimension_that_a_rule_fixes(monkeypatch):
    def fixes(op, components, x):
        assert int(x.primal.shape[0])  # what no rule may do
        return fomoh_fx.HyperDual(op(x.primal), 2 * x.primal * x.tangent, None)

    monkeypatch.setitem(fomoh_fx.rules.registry.RULES, torch.ops.aten.square.default, fixes)
    hd = fomoh_fx.transform(lambda x: x.square().sum(), wrt="inputs", second_order=None)
    with pytest.raises(
        SpecialisationError, match=r"dimension 0 of x is fixed to 4 .*\(at test_dynamic_shapes\.py:\d+, assert int"
    ):
        hd.trace(r(4), tangents=(r(2, 4),), dynamic_shapes={"x": {0: Dim.DYNAMIC}})


def test_sizes_that_equality_and_range_exclude_are_traced_on_their_own():
    hd = traced(product, r(4, 3), r(4, 3), dynamic_shapes=({0: BATCH}, {0: BATCH}))
    assert not serves(hd, r(4, 3), r(1, 3))
    hd = traced(product, r(4, 3), r(4, 3), dynamic_shapes=({0: BATCH}, {0: BATCH}))
    assert not serves(hd, r(65, 3), r(65, 3))


@pytest.mark.parametrize("size", [0, 1])
def test_a_batch_of_none_and_of_one(size):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    problem = Problem(model, (r(4, 3),), loss=lambda y: y.square().sum())
    hd = fomoh_fx.transform(model, problem.loss)
    hd.trace(r(4, 3), tangents=problem.directions(2), dynamic_shapes={"input": {0: Dim.DYNAMIC}}, targets=())
    if size:
        check_call(hd, Problem(model, (r(size, 3),), loss=problem.loss))
    else:
        out = hd(r(0, 3), tangents=problem.directions(2), targets=())
        assert out.primal == 0 and not out.tangent.any() and not out.cross.any()


class Classifier(nn.Module):
    """Convolution, batch statistics, flattening and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Tanh(), nn.MaxPool2d(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).flatten(1))


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
def test_inputs_and_targets_of_one_dynamic_batch(second_order):
    """The tangents of the inputs have the dynamic batch too."""

    def problem(n: int) -> Problem:
        return Problem(model, (r(n, 2, 6, 6),), loss=F.cross_entropy, targets=(torch.arange(n) % 3,), wrt="inputs")

    model = Classifier().double().train()
    hd = fomoh_fx.transform(model, F.cross_entropy, wrt="inputs", second_order=second_order)
    first = problem(4)
    dims = {"x": {0: BATCH}, "targets": ({0: BATCH},)}
    hd.trace(*first.args, targets=first.targets, tangents=first.directions(2), dynamic_shapes=dims)
    before = hd.latest
    for n in (3, 5):
        check_call(hd, problem(n))
        assert hd.latest is before


def test_both_factors_of_a_convolution():
    """vmap's own rule fixes the batch where both factors are batched."""
    dims = ({0: Dim.DYNAMIC}, None)
    hd = traced(lambda x, w: F.conv1d(x, w).sin().sum(), r(4, 2, 6), r(3, 2, 3), dynamic_shapes=dims)
    assert serves(hd, r(5, 2, 6), r(3, 2, 3))


def test_a_slice_that_is_the_whole():
    """A memory layout that only some sizes have restricts nothing."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.positions[: x.shape[1]]).tanh()

    model = Model().double()
    problem = Problem(model, (r(2, 3, 4),))
    hd = fomoh_fx.transform(model, problem.loss)
    hd.trace(*problem.args, tangents=problem.directions(2), targets=(), dynamic_shapes=({1: Dim.DYNAMIC},))
    before = hd.latest
    for length in (4, 5):
        check_call(hd, Problem(model, (r(2, length, 4),)))
        assert hd.latest is before


def test_more_dimensions_than_before_are_traced_anew():
    hd = traced(product, r(4, 3), r(4, 3), dynamic_shapes=({0: BATCH}, {0: BATCH}))
    before, both = hd.latest, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    hd.trace(r(4, 3), r(4, 3), tangents=(r(2, 4, 3), r(2, 4, 3)), dynamic_shapes=(both, both))
    assert hd.latest is not before
    assert serves(hd, r(6, 7), r(6, 7))


def test_a_marked_dimension():
    hd = fomoh_fx.transform(lambda x: x.sin().sum(), wrt="inputs")
    x = r(4)
    torch._dynamo.mark_dynamic(x, 0)
    for _ in range(2):
        hd(x, tangents=(r(2, 4),))
    assert vars(x)["_dynamo_dynamic_indices"] == {0}
    assert serves(hd, r(5))


def test_a_marked_dimension_of_any_size():
    """0 and 1 are captured on their own."""
    hd = fomoh_fx.transform(lambda x: x.sin().sum(), wrt="inputs")
    for size in (4, 1, 0, 2, 1):
        x, v = r(size), r(2, size)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(hd(x, tangents=(v,)).tangent, (v * x.cos()).sum(1))
    assert len(hd._traced) == 3
    fresh = fomoh_fx.transform(lambda x: x.sin().sum(), wrt="inputs")
    one = r(1)
    torch._dynamo.mark_dynamic(one, 0)
    torch.testing.assert_close(fresh(one, tangents=(r(1, 1),)).primal, one.sin().sum())


def test_torch_compile_at_a_size_that_was_served():
    hd = traced(lambda x: x.sin().sum(), r(4), dynamic_shapes=({0: Dim.DYNAMIC},))
    x, v = r(6), (r(2, 6),)
    expected = hd(x, tangents=v)
    torch.testing.assert_close(torch.compile(hd, backend="eager")(x, tangents=v).cross, expected.cross)


def test_a_dynamic_size_multiplies_what_is_alike_for_all_samples():
    def scaled(x, y):
        return ((x + y).sin() * (2 * x.shape[0]) / x.shape[0]).sum()

    hd, v = fomoh_fx.transform(scaled, wrt="inputs"), r(2, 1, 3)
    for n in (4, 6):
        x, y = r(n, 3), r(n, 3)
        given = (v.expand(2, n, 3), None)
        if n == 4:
            hd.trace(x, y, tangents=given, dynamic_shapes={"x": {0: BATCH}, "y": {0: BATCH}})
        out = hd(x, y, tangents=given)
        torch.testing.assert_close(out.tangent, (2 * (x + y).cos() * v).sum((1, 2)))
        torch.testing.assert_close(out.hessian(), (-2 * (x + y).sin() * v[:, None] * v).sum((2, 3)))
    assert len(hd._traced) == 1


def test_parts_of_a_data_set_are_one_trace():
    """Batches of any size, wherever in memory they begin, unless the model asks for that."""

    def by_offset(x, y):
        return product(x, y) * (1 + x.storage_offset())

    data = r(40, 3)
    for function, count in ((product, 1), (by_offset, 3)):
        hd = traced(function, data[:8], data[:8], dynamic_shapes=({0: BATCH}, {0: BATCH}))
        for start, stop in ((0, 5), (8, 16), (16, 23)):
            x, v = data[start:stop], r(2, stop - start, 3)
            out = hd(x, x, tangents=(v, torch.zeros_like(v)))
            factor = function(x, x) / product(x, x)
            torch.testing.assert_close(out.primal, function(x, x))
            torch.testing.assert_close(out.tangent, factor * torch.stack([product(each, x) for each in v]))
        assert len(hd._traced) == count


def test_a_wider_range_is_traced_anew():
    narrow, wide = Dim("narrow", max=5), Dim("wide", max=50)
    hd = traced(product, r(4, 3), r(4, 3), dynamic_shapes=({0: narrow}, {0: narrow}))
    tangents = (r(2, 4, 3), r(2, 4, 3))
    first = hd.latest
    hd.trace(r(4, 3), r(4, 3), tangents=tangents, dynamic_shapes=({0: wide}, {0: wide}))
    assert hd.latest is not first and serves(hd, r(20, 3), r(20, 3))
    hd.trace(r(4, 3), r(4, 3), tangents=tangents, dynamic_shapes=({0: narrow}, {0: narrow}))
    assert len(hd._traced) == 2


def parts(x):
    """By sizes that follow from the dynamic one."""
    low, high = x.sin().chunk(2, 1)
    first, _ = x.split([x.shape[1] - 2, 2], 1)
    return (
        (low.sum(1) * high.square().sum(1)).sum() + x.cos().split(x.shape[1] // 2 + 1, 1)[0].prod(1).sum() + first.sum()
    )


def halves(x):
    return x.reshape(2, -1, x.shape[1]).sin().prod(0).square().sum()


def attention(x):
    return F.scaled_dot_product_attention(x, x.sin(), x.cos()).square().sum()


def distances(x):
    return F.pdist(x).square().cos().sum()


def same_as_distances(x):
    """PyTorch's own has no second derivative by reverse mode."""
    rows, columns = torch.triu_indices(len(x), len(x), 1)
    return (x[rows] - x[columns]).square().sum(1).cos().sum()


def sampled(x):
    points = torch.stack([x[0, 0, :2, :3].sin(), 2 * x[0, 0, 1:3, :3]], -1)[None]
    return F.grid_sample(x, points, padding_mode="reflection", align_corners=False).square().sum()


SIZES = {
    parts: ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, (5, 6), [(4, 8), (9, 13)]),
    halves: ({0: 2 * Dim("half", min=1)}, (4, 3), [(8, 3), (6, 3)]),
    attention: ({2: Dim.DYNAMIC}, (2, 4, 6), [(2, 4, 9), (2, 4, 2)]),
    distances: ({0: Dim.DYNAMIC}, (5, 3), [(9, 3), (3, 3)]),
    sampled: ({2: Dim.DYNAMIC}, (1, 2, 6, 5), [(1, 2, 9, 5), (1, 2, 5, 5)]),
}


@pytest.mark.parametrize("function", SIZES)
def test_sizes_that_follow_from_dynamic_ones(function):
    dims, size, others = SIZES[function]
    hd = traced(function, r(*size), dynamic_shapes=(dims,))
    for other in others:
        x, v = r(*other), r(2, *other)
        out = hd(x, tangents=(v,))
        truth = same_as_distances if function is distances else function
        value, slopes, plane = reverse_over_reverse(truth, [x], [v])
        torch.testing.assert_close(out.primal, value)
        torch.testing.assert_close(out.tangent, slopes)
        torch.testing.assert_close(out.hessian(), plane)
    assert len(hd._traced) == 1
