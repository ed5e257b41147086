"""Products and cumulative operators along a dimension."""

import pytest
import torch

from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.rules.registry import RULES
from tests.rules.checking import Sample, check

aten = torch.ops.aten
inf = float("inf")


def r(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


ZEROS = [
    Sample((t(2.0, 0.0, 3.0, -1.0, 0.5), 0), name="one zero"),
    Sample((t(2.0, 0.0, 3.0, 0.0, 0.5), 0), name="two zeros", truth="difference"),
    Sample((t(0.0, 0.0, 3.0, 0.0), 0), name="three zeros", truth="difference"),
]
MASKED = t(-inf, -inf, 1.0, -inf, 0.5)

SAMPLES = {
    aten.prod.default: [
        Sample((r(3, 5),)),
        Sample((r(),), name="number"),
        Sample((r(1),), name="one element"),
        Sample((torch.randn(3),), {"dtype": torch.float64}, name="wider", tolerance=1e-6),
        *[Sample(s.args[:1], name=s.name, truth=s.truth) for s in ZEROS],
    ],
    aten.prod.dim_int: [
        Sample((r(3, 4), 1)),
        Sample((r(2, 5, 3).transpose(0, 2), -2, True), name="not contiguous"),
        Sample((r(2, 3, dtype=torch.complex128), 1), name="complex"),
        Sample((r(), 0), name="number"),
        *ZEROS,
    ],
    aten.cumprod.default: [
        Sample((r(3, 4), 1)),
        Sample((r(5, 3).t(), -1), name="not contiguous"),
        Sample((r(), 0), name="number"),
        *[Sample(s.args, name=s.name, truth="difference") for s in ZEROS],
    ],
    aten.logcumsumexp.default: [
        Sample((r(3, 4), 1)),
        Sample((r(7, 3).t(), -1), name="not contiguous"),
        Sample((1e3 * r(5), 0), name="large"),
        Sample((r(), 0), name="number"),
    ],
}
CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)])
def test_rule(op, sample, second_order):
    check(op, sample, second_order)


def test_logcumsumexp_takes_no_part_in_masked_elements():
    op = aten.logcumsumexp.default
    components = Components(2, "plane")
    v, c = r(2, 5), r(3, 5)
    y = RULES[op](op, components, HyperDual(MASKED, v, c), 0)
    kept = [2, 4]
    z = RULES[op](op, components, HyperDual(MASKED[kept], v[:, kept], c[:, kept]), 0)
    assert not y.tangent[:, 1].any() and not y.cross[:, 1].any()
    torch.testing.assert_close(y.tangent[:, [2, 3, 4]], z.tangent[:, [0, 0, 1]])
    torch.testing.assert_close(y.cross[:, [2, 3, 4]], z.cross[:, [0, 0, 1]])


def test_first_order_alone_has_no_cross_component():
    op = aten.logcumsumexp.default
    assert RULES[op](op, Components(1, None), HyperDual(r(4), r(1, 4)), 0).cross is None
