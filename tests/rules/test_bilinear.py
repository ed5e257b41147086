"""Bilinear rules: products and convolutions."""

import pytest
import torch

from tests.rules.checking import Sample, check

aten = torch.ops.aten


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


SAMPLES = {
    aten.mm.default: [Sample((r(3, 4), r(4, 2))), Sample((r(3, 4), r(4, 2)), active=[1])],
    aten.bmm.default: [Sample((r(2, 3, 4), r(2, 4, 2)))],
    aten.linear.default: [
        Sample((r(3, 4), r(2, 4), r(2))),
        Sample((r(2, 3, 4), r(2, 4), None)),
        Sample((r(4), r(2, 4), r(2)), name="vector"),
        Sample((r(3, 4), r(2, 4), r(2)), active=[1, 2], name="first layer"),
        Sample((r(3, 4), r(2, 4), r(2)), active=[2], name="bias"),
    ],
    aten.convolution.default: [
        Sample((r(2, 4, 5, 5), r(6, 4, 3, 3), r(6), [1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
        Sample((r(2, 4, 6), r(6, 2, 3), r(6), [2], [1], [1], False, [0], 2), name="groups"),
        Sample((r(2, 4, 5), r(4, 3, 3), None, [2], [1], [1], True, [1], 1), name="transposed"),
        Sample((r(2, 4, 5), r(4, 3, 3), r(6), [2], [1], [1], True, [0], 2), name="transposed groups"),
        Sample((r(1, 2, 5, 5), r(3, 2, 3, 3), r(3), [1, 1], [2, 2], [2, 2], False, [0, 0], 1), active=[2], name="bias"),
    ],
}
CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)])
def test_rule(op, sample, second_order):
    check(op, sample, second_order)
