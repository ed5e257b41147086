"""Softmax, its logarithm, and logsumexp, with masked elements."""

import pytest
import torch

import fomoh_fx
from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.rules.registry import RULES
from tests.oracle import relative_error, reverse_over_reverse
from tests.rules.checking import Sample, check

aten = torch.ops.aten
inf = float("inf")


def r(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


MASKED = r(3, 4)
MASKED[0, 1] = MASKED[2, :3] = -inf
SOFTMAX = [
    Sample((r(3, 4), 1, False)),
    Sample((r(2, 3, 4).transpose(0, 2), 0, False), name="not contiguous"),
    Sample((1e3 * r(3, 4), -1, False), name="large"),
    Sample((MASKED, 1, False), name="masked"),
    Sample((r(), 0, False), name="number"),
]
FINITE = [s for s in SOFTMAX if s.name != "masked"]  # the logarithm of a masked element is -inf
LOGSUMEXP = [
    Sample((r(3, 4), [1])),
    Sample((r(2, 3, 4), [0, -1], True)),
    Sample((1e3 * r(3, 4), [1]), name="large"),
    Sample((MASKED, [1]), name="masked"),
    Sample((r(), [0]), name="number"),
]

SAMPLES = {
    aten._softmax.default: SOFTMAX,
    aten._safe_softmax.default: [Sample(s.args[:2], name=s.name) for s in SOFTMAX],
    aten._log_softmax.default: FINITE,
    aten.logsumexp.default: LOGSUMEXP,
}
CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)])
def test_rule(op, sample, second_order):
    check(op, sample, second_order)


FUNCTIONS = {
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(0),
    "logsumexp": lambda x: x.logsumexp((0, 1)),
    "softmin": lambda x: torch.nn.functional.softmin(x, 1),
    "masked, then cleaned": lambda x: x.masked_fill(MASKED.isinf(), -inf).softmax(0).nan_to_num(0.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    check(FUNCTIONS[name], Sample((r(3, 4),)))


@pytest.mark.parametrize("op", [aten._safe_softmax.default, aten.logsumexp.default])
def test_a_fully_masked_row_has_no_derivative(op):
    x = torch.tensor([[-inf, -inf], [0.0, 1.0]])
    y = RULES[op](op, Components(2, "plane"), HyperDual(x, torch.randn(2, 2, 2), torch.randn(3, 2, 2)), 1)
    assert not y.tangent[:, 0].any() and not y.cross[:, 0].any()
    assert y.tangent.isfinite().all() and y.cross.isfinite().all()


def test_a_fully_masked_row_that_is_selected_away_leaves_the_rest_finite():
    mask = torch.tensor([[True, True], [False, True]])

    def function(x: torch.Tensor) -> torch.Tensor:
        s = x.masked_fill(mask, -inf).softmax(1)
        return torch.where(mask.all(1, keepdim=True), 0.0, s).sum()

    x, v = r(2, 2), r(2, 2, 2)
    out = fomoh_fx.transform(function, wrt="inputs")(x, tangents=(v,))
    _, tangent, cross = reverse_over_reverse(function, [x], [v])
    assert relative_error(out.tangent, tangent) < 1e-9
    assert relative_error(out.hessian(), cross) < 1e-9


@pytest.mark.parametrize("op", [aten._softmax.default, aten._log_softmax.default])
def test_dtype_is_kept(op):
    x, v = r(3, 4, dtype=torch.bfloat16), r(1, 3, 4, dtype=torch.bfloat16)
    y = RULES[op](op, Components(1, "plane"), HyperDual(x, v, v), 1, False)
    assert {y.primal.dtype, y.tangent.dtype, y.cross.dtype} == {torch.bfloat16}
