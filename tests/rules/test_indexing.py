"""Indexing rules: reading and writing at indices, duplicates and symbolic zeros included."""

import pytest
import torch

import fomoh_fx
from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.rules.registry import RULES
from tests.oracle import reverse_over_reverse
from tests.rules.checking import Sample, check

aten = torch.ops.aten
GENERATOR = torch.Generator().manual_seed(0)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR)


def n(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def each(args: tuple, kwargs: dict | None = None, **options: object) -> list[Sample]:
    """A sample for both floating-point arguments active, and for each alone."""
    return [Sample(args, kwargs or {}, active=active, **options) for active in ([0, 1], [0], [1])]


MASK = torch.tensor([[True, False, True], [False, True, True]])
TWICE = n(2, 0, 2)  # a duplicate index

READS = {
    aten.index.Tensor: [
        Sample((r(3, 4), [TWICE])),
        Sample((r(3, 4), [None, n(1, 3)])),
        Sample((r(3, 4, 2), [n(0, 2), n(1, 3)]), name="two"),
        Sample((r(3, 2, 4), [n([0, 2], [1, 1]), None, n(1, 3)]), name="not adjacent"),
        Sample((r(2, 3, 2), [MASK]), name="mask"),
        Sample((r(3, 4), [n(-1)[0], None]), name="scalar index"),
    ],
    aten._unsafe_index.Tensor: [Sample((r(3, 4), [None, n(1, 3)]))],
    aten.index_select.default: [Sample((r(3, 4), 1, TWICE)), Sample((r(3, 4), -2, TWICE)), Sample((r(), 0, n(0)))],
    aten.gather.default: [
        Sample((r(2, 3), 1, n([0, 2, 2, 1]))),
        Sample((r(2, 3), -2, n([1, 0, 1], [0, 0, 0], [1, 1, 0]))),
        Sample((r(), 0, torch.tensor(0))),
    ],
    aten.take.default: [Sample((r(2, 3), n([0, 5], [-1, 5])))],
    aten.embedding.default: [
        Sample((r(4, 2), n([0, 3], [3, 1]))),
        Sample((r(4, 2), n(1, 3, 1, 2), 1), name="padding"),
        Sample((r(4, 2), torch.tensor(2)), name="one"),
    ],
    aten.masked_select.default: [Sample((r(2, 3), MASK))],
}

WRITES = {
    aten.index_put.default: [
        *each((r(3, 4), [n(2, 0)], r(2, 4))),
        *each((r(3, 4), [None, n(1, 3)], r(3, 1)), name="broadcast"),
        *each((r(3, 4), [TWICE], r(3, 4), True), name="accumulate"),
        *each((r(3, 4), [TWICE], r(3, 4)), name="duplicates", truth="difference"),
        *each((r(3, 2, 4), [n(0, 2), None, n(1, 3)], r(2, 2)), name="not adjacent"),
        *each((r(2, 3), [MASK], r(4)), name="mask"),
        *each((r(2, 3), [MASK], r()), name="one value"),
    ],
    aten._unsafe_index_put.default: each((r(3, 4), [n(2, 0)], r(2, 4))),
    aten.put.default: [
        *each((r(2, 3), n(5, 0), r(2))),
        *each((r(2, 3), n(5, 0, 5), r(3), True), name="accumulate"),
    ],
    aten.scatter.src: [
        *each((r(2, 3), 1, n([2, 0]), r(1, 2))),
        *each((r(2, 3), -2, n([0, 1, 1]), r(2, 4)), name="part of the source", truth="difference"),
        *each((r(2, 3), 1, n([2, 2], [0, 0]), r(2, 2)), name="duplicates", truth="difference"),
        *each((r(), 0, torch.tensor(0), r()), name="scalar"),
    ],
    aten.scatter.value: [Sample((r(2, 3), 1, n([2, 0]), 3.0)), Sample((r(), 0, torch.tensor(0), 3.0))],
    aten.scatter.reduce: [
        *each((r(2, 3), 1, n([2, 2]), r(1, 2)), {"reduce": "add"}, truth="difference"),
        *each((r(2, 3), 1, n([2, 2]), r(1, 2)), {"reduce": "multiply"}, truth="difference"),
    ],
    aten.scatter.value_reduce: [
        Sample((r(2, 3), 1, n([2, 2]), 3.0), {"reduce": how}, truth="difference") for how in ("add", "multiply")
    ],
    aten.scatter_add.default: [*each((r(2, 3), 1, n([2, 2]), r(1, 2))), *each((r(), 0, torch.tensor(0), r()))],
    aten.index_add.default: [
        *each((r(3, 2), 0, TWICE, r(3, 2))),
        *each((r(2, 3), -1, n(0, 1), r(2, 2)), {"alpha": 3}),
        *each((r(), 0, n(0), r())),
    ],
    aten.index_copy.default: [*each((r(3, 2), 0, n(2, 0), r(2, 2))), *each((r(), 0, torch.tensor(0), r()))],
    aten.index_fill.int_Scalar: [Sample((r(3, 2), 0, TWICE, 5.0)), Sample((r(), 0, n(0), 5.0))],
    aten.index_fill.int_Tensor: each((r(2, 3), 1, TWICE, r())),
    aten.masked_scatter.default: [*each((r(2, 3), MASK, r(3, 2))), *each((r(3), MASK, r(4)), name="broadcast")],
    aten.slice_scatter.default: [
        *each((r(2, 4), r(2, 2), 1, 1, 3)),
        *each((r(4, 2), r(2, 2), -2, -3, -1)),
        *each((r(4, 2), r(2, 2), 0, 0, 4, 2)),
        *each((r(4, 2), r(4, 2))),
    ],
    aten.select_scatter.default: [*each((r(2, 3), r(2), 1, -1)), *each((r(2, 3), r(3), 0, 0))],
    aten.diagonal_scatter.default: [*each((r(3, 3), r(3))), *each((r(2, 3, 2), r(3, 2), 0, 0, -1))],
    aten.as_strided_scatter.default: [
        *each((r(3, 4), r(2, 3), [2, 3], [1, 4], 1), truth="difference"),
        *each((r(4, 3).t(), r(2, 2), [2, 2], [1, 2]), name="transposed", truth="difference"),
    ],
}

ZERO_ONCE = torch.tensor([[0.0, 2.0, -1.0], [3.0, 0.5, 0.0]], dtype=torch.float64)
SOURCE = torch.tensor([[1.5, 0.0, -2.0], [0.0, 0.0, 0.7]], dtype=torch.float64)
PLACES = n([0, 0, 2], [1, 1, 1])
TIED = torch.tensor([[2.0, 1.0, 3.0], [3.0, 3.0, -1.0]], dtype=torch.float64)

REDUCTIONS = {
    aten.scatter_reduce.two: [
        sample
        for own in (True, False)
        for how in ("sum", "mean", "amax", "amin", "prod")
        for sample in each((r(2, 3), 1, PLACES, r(2, 3), how), {"include_self": own}, truth="difference", name=how)
    ]
    + [
        *each((ZERO_ONCE, 1, PLACES, SOURCE, "prod"), truth="difference", name="zeros"),
        *each((ZERO_ONCE, 1, PLACES, SOURCE, "prod"), {"include_self": False}, truth="difference", name="zeros"),
        *each((TIED, 1, PLACES, TIED.flip(1), "amax"), name="ties"),
        *each((-TIED, 1, PLACES, -TIED.flip(1), "amin"), name="ties"),
        *each((r(2, 3), 0, n([1, 1]), r(2, 3), "amax"), name="part of the source", truth="difference"),
        *each((r(), 0, torch.tensor(0), r(), "mean"), name="scalar"),
    ],
    aten.index_reduce.default: [
        Sample((r(3, 2), 0, TWICE, r(3, 2), how), {"include_self": own}, truth="difference", name=how)
        for how, own in (("prod", True), ("mean", False), ("amax", True), ("amin", False))
    ]
    + [Sample((r(), 0, torch.tensor(0), r(), "prod"), truth="difference", name="scalar")],
}

INDICES, OFFSETS = n(0, 3, 3, 1, 2), n(0, 2, 2)  # a repeated row, and an empty bag
BAG_SAMPLES = [
    *[Sample((r(4, 2), INDICES, OFFSETS, False, mode), outputs=[0], truth="difference") for mode in (0, 1, 2)],
    *[
        Sample((r(4, 2), INDICES, n(0, 2, 5), False, mode, False, None, True, 3), outputs=[0], truth="difference")
        for mode in (0, 1, 2)
    ],
    *[
        Sample((r(4, 2), INDICES, OFFSETS, False, 0, False, r(5), False, 1), outputs=[0], active=a, truth="difference")
        for a in ([0, 1], [0], [1])
    ],
]
BAGS = {aten._embedding_bag.default: BAG_SAMPLES, aten._embedding_bag_forward_only.default: BAG_SAMPLES}

SAMPLES = READS | WRITES | REDUCTIONS | BAGS
CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)])
def test_rule(op, sample, second_order):
    check(op, sample, second_order)


def test_gradients_scaled_by_frequency_are_refused():
    weight = HyperDual(r(3, 2), r(1, 3, 2))
    with pytest.raises(UnsupportedOpError, match="scale_grad_by_freq"):
        RULES[aten.embedding.default](aten.embedding.default, Components(1, "plane"), weight, n(0), -1, True)


def test_take_along_dim_and_in_place_writes():
    """Composite and in-place forms become the operators above."""

    def function(x):
        y = torch.take_along_dim(x, x.argsort(1), 1)
        y[0] = x[1] ** 2
        y[:, ::2] *= x[:, 1:2]
        return (y**2).sum()

    x, v = r(2, 3), r(2, 2, 3)
    out = fomoh_fx.transform(function, wrt="inputs")(x, tangents=(v,))
    hessian = torch.func.jacrev(torch.func.jacrev(function))(x).reshape(6, 6)
    torch.testing.assert_close(out.hessian(), v.reshape(2, 6) @ hessian @ v.reshape(2, 6).T)


def test_masked_scatter_of_a_number_of_rows_that_is_data():
    """One graph serves every number of rows."""

    def function(x, w, keep, mask):
        rows = (x @ w)[keep]
        return x.masked_scatter(mask.unsqueeze(-1), rows.tanh()).square().sum()

    x, w, vs = r(4, 2), r(2, 2), [r(2, 4, 2), r(2, 2, 2)]
    mask = torch.tensor([False, True, True, False])
    hd = fomoh_fx.transform(function, wrt="inputs")
    for keep in (torch.tensor([True, False, True, False]), torch.tensor([True, True, True, False])):
        out = hd(x, w, keep, mask, tangents=[*vs, None, None])
        y, tangents, crosses = reverse_over_reverse(lambda x, w: function(x, w, keep, mask), [x, w], vs)  # noqa: B023
        for actual, expected in ((out.primal, y), (out.tangent, tangents), (out.hessian(), crosses)):
            torch.testing.assert_close(actual, expected)
    assert len(hd._traced) == 1


def test_padding_of_a_number_of_rows_that_is_data():
    def function(x, keep):
        rows = x.square()[keep]
        padded = torch.nn.functional.pad(rows, (1, 0, 0, 2), value=0.5)
        return torch.cat([padded.cumsum(1), padded.exp()]).square().sum()

    x, v = r(4, 2), r(2, 4, 2)
    hd = fomoh_fx.transform(function, wrt="inputs")
    for keep in (torch.tensor([True, False, True, False]), torch.tensor([True, True, True, False])):
        out = hd(x, keep, tangents=(v, None))
        y, tangents, crosses = reverse_over_reverse(lambda x: function(x, keep), [x], [v])  # noqa: B023
        for actual, expected in ((out.primal, y), (out.tangent, tangents), (out.hessian(), crosses)):
            torch.testing.assert_close(actual, expected)
    assert len(hd._traced) == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda x: torch.select_scatter(x, x.select(1, 0).sin(), 1, 0),
        lambda x: torch.slice_scatter(x, x[:, :1].sin(), 1, 0, 1),
        lambda x: torch.diagonal_scatter(x, x.diagonal().sin()),
    ],
)
def test_writing_into_what_overlaps_itself_is_refused(write):
    """PyTorch keeps the overlap in the copy, in which a write then changes other elements, too."""
    x, v = torch.randn(3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    with pytest.raises(UnsupportedOpError, match=r"overlaps itself in memory.*\n  at test_indexing\.py"):
        fomoh_fx.transform(lambda x: write(x.unfold(0, 2, 1)).square().sum(), wrt="inputs")(x, tangents=(v,))
    copied = fomoh_fx.transform(lambda x: write(x.unfold(0, 2, 1).contiguous()).square().sum(), wrt="inputs")
    assert copied(x, tangents=(v,)).cross.isfinite().all()
