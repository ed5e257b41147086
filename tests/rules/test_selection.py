"""Selection rules: extreme values, sorting, pooling by maxima, choices between operands; ties included."""

import pytest
import torch

from tests.rules.checking import Sample, check

aten = torch.ops.aten
GENERATOR = torch.Generator().manual_seed(0)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR)


def each(*args: torch.Tensor, **options: object) -> list[Sample]:
    """Both arguments active, and each alone."""
    return [Sample(args, active=active, **options) for active in ([0, 1], [0], [1])]


TIED = torch.tensor([[2.0, -1.0, 2.0, 0.0], [3.0, 3.0, 3.0, 1.0]], dtype=torch.float64)
HOLES = torch.tensor([[1.0, torch.nan, 2.0, 3.0], [4.0, 5.0, -6.0, torch.nan]], dtype=torch.float64)
FRACTIONS = torch.tensor([[[0.3, 0.8]]], dtype=torch.float64)

ALONG = {
    aten.max.dim: [Sample((r(2, 3), 1)), Sample((r(2, 3), -2, True)), Sample((TIED, 1), name="ties"), Sample((r(), 0))],
    aten.min.dim: [Sample((r(2, 3), 1)), Sample((r(2, 3), 0, True)), Sample((TIED, 1), name="ties"), Sample((r(), 0))],
    aten.median.dim: [Sample((r(2, 4), 1)), Sample((r(3, 2), 0, True)), Sample((TIED, 1), name="ties")],
    aten.nanmedian.dim: [Sample((r(2, 4), 1)), Sample((HOLES, 1, True), name="nan")],
    aten.mode.default: [Sample((r(2, 4), 1)), Sample((TIED, -1, True), name="ties")],
    aten.kthvalue.default: [Sample((r(2, 4), 2)), Sample((r(3, 2), 3, 0, True)), Sample((TIED, 3), name="ties")],
    aten.sort.default: [Sample((r(2, 3),)), Sample((r(2, 3), 0, True)), Sample((r(),))],
    aten.sort.stable: [Sample((TIED,), {"stable": True, "dim": 1, "descending": True}, name="ties")],
    aten.topk.default: [Sample((r(2, 4), 2)), Sample((r(3, 2), 2, 0, False)), Sample((TIED, 2), name="ties")],
    aten.cummax.default: [Sample((r(2, 4), 1)), Sample((TIED, -1), name="ties")],
    aten.cummin.default: [Sample((r(4, 2), 0)), Sample((TIED, -1), name="ties")],
}

POOLS = {
    aten.max_pool2d_with_indices.default: [
        Sample((r(2, 1, 4, 4), [2, 2], [1, 2], [1, 1])),
        Sample((r(1, 4, 4), [2, 2], [1, 1], [0, 0], [2, 2], True)),
        Sample((TIED.reshape(1, 1, 2, 4), [2, 2]), name="ties"),
        Sample((r(1, 4, 4, 2).permute(0, 3, 1, 2), [2, 2]), name="channels last"),
    ],
    aten.max_pool3d_with_indices.default: [
        Sample((r(1, 1, 2, 4, 2), [2, 2, 1])),
        Sample((r(1, 2, 2, 2), [2, 1, 2])),
        Sample((r(0, 1, 2, 2, 2), [2, 2, 2]), name="empty"),
    ],
    aten.adaptive_max_pool2d.default: [Sample((r(2, 1, 4, 3), [2, 2])), Sample((r(1, 4, 3), [2, 1]))],
    aten.adaptive_max_pool3d.default: [Sample((r(1, 1, 2, 4, 3), [1, 2, 2])), Sample((r(1, 2, 2, 2), [1, 2, 1]))],
    aten.fractional_max_pool2d.default: [Sample((r(1, 1, 5, 5), [2, 2], [2, 3], FRACTIONS), active=[0])],
    aten.fractional_max_pool3d.default: [
        Sample((r(1, 1, 4, 4, 4), [2, 2, 2], [2, 2, 2], FRACTIONS.new_full((1, 1, 3), 0.4)), active=[0])
    ],
    aten.max_unpool2d.default: [
        Sample((r(2, 1, 2, 2), torch.tensor([[[[0, 3], [9, 10]]], [[[1, 2], [8, 15]]]]), [4, 4])),
        Sample((r(1, 2, 2), torch.tensor([[[0, 3], [9, 10]]]), [4, 4])),
    ],
    aten.max_unpool3d.default: [
        Sample((r(1, 1, 1, 2, 2), torch.tensor([[[[[0, 3], [9, 10]]]]]), [2, 4, 4], [2, 2, 2], [0, 0, 0])),
        Sample((r(1, 1, 2, 2), torch.tensor([[[[0, 3], [9, 10]]]]), [2, 4, 4], [2, 2, 2], [0, 0, 0])),
    ],
}

SHARED = {
    aten.median.default: [Sample((r(2, 3),)), Sample((TIED,), name="ties"), Sample((r(),))],
    aten.nanmedian.default: [Sample((r(5),)), Sample((HOLES,), name="nan"), Sample((TIED,), name="ties")],
    aten.aminmax.default: [
        Sample((r(2, 3),)),
        Sample((r(2, 3),), {"dim": 1}),
        Sample((TIED,), {"dim": -1, "keepdim": True}, name="ties"),
        Sample((TIED,), name="all tied"),
        Sample((r(),), {"dim": 0}),
    ],
}

A = torch.tensor([[1.0, 2.0, -1.0], [0.0, 5.0, 3.0]], dtype=torch.float64)
B = torch.tensor([1.0, 3.0, -1.0], dtype=torch.float64)
LOW = torch.tensor([[-1.0], [2.0]], dtype=torch.float64)

CHOICES = {
    **{op: [*each(r(2, 3), r(3)), *each(A, B, name="ties")] for op in (
        aten.maximum.default, aten.minimum.default, aten.fmax.default, aten.fmin.default
    )},
    aten.clamp.default: [
        Sample((A, 0, 3), name="at the bounds"),
        Sample((A, None, 2.5)),
        Sample((A, 0.5)),
        Sample((A, 2, -1), name="no interval"),
    ],
    aten.clamp.Tensor: [
        *[Sample((A, LOW, LOW + 3), active=active) for active in ([0, 1, 2], [0], [1], [2])],
        Sample((A, B, B + 1), name="at the bounds"),
        Sample((r(2, 3), r(2, 1), r(1)), name="no interval in places"),
        *each(A, B, None, name="below only"),
        *each(A, None, B, name="above only"),
    ],
    aten.clamp_min.default: [Sample((A, 1.0), name="at the bound")],
    aten.clamp_max.default: [Sample((A, 1.0), name="at the bound")],
    aten.clamp_min.Tensor: each(A, B, name="at the bound"),
    aten.clamp_max.Tensor: each(A, B, name="at the bound"),
}  # fmt: skip

SAMPLES = ALONG | POOLS | SHARED | CHOICES
CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)])
def test_rule(op, sample, second_order):
    check(op, sample, second_order)
