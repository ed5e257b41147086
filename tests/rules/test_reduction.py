"""Reductions: extreme values, variances, norms."""

import pytest
import torch

import fomoh_fx
from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.rules.registry import RULES
from tests.rules.checking import Sample, check

aten = torch.ops.aten
inf = float("inf")


def r(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


EXTREME = [
    Sample((r(3, 4), [1])),
    Sample((r(2, 3, 4), [0, -1], True), name="two dimensions"),
    Sample((r(3, 4),), name="all"),
    Sample((t(1.0, 3.0, 3.0, 1.0, 2.0, 1.0), [0]), name="ties"),
    Sample((r(3, 4).t(), [0]), name="not contiguous"),
    Sample((r(), [0]), name="number"),
]
TOTAL = [Sample((r(3, 4),)), Sample((t(1.0, 3.0, 3.0, 1.0),), name="ties"), Sample((r(),), name="number")]
VARIANCE = [
    Sample((r(3, 4),)),
    Sample((r(3, 4), [1]), {"correction": 0}),
    Sample((r(2, 3, 4), [0, -1]), {"correction": 2, "keepdim": True}),
    Sample((r(2, 3, 4).transpose(0, 2), [1]), name="not contiguous"),
    Sample((r(2, 3, dtype=torch.complex128), [1]), name="complex"),
]
CONSTANT = Sample((t(2.0, 2.0, 2.0),), name="no variance")
NORM = [
    Sample((r(3, 4),)),
    Sample((r(3, 4), 2, [1])),
    Sample((r(3, 4), 1, [0], True)),
    *[Sample((r(2, 3, 4), p, [0, -1])) for p in (0, 0.5, 1.5, 3, 4, -1, -2)],
    *[Sample((t(2.0, -2.0, 1.0, 2.0, 0.5, -0.5), p), name=f"ties {p}") for p in (inf, -inf)],
    Sample((t(0.0, 2.0, -1.0),), name="one zero"),
    Sample((t(0.0, 2.0, -1.0), 1), name="kink"),
    Sample((t(0.0, 2.0, -1.0), 3), name="one zero, cubic"),
    Sample((t(0.0, 0.0), 1), name="zero, absolute values"),
    Sample((t(0.0, 0.0), 3), name="zero, cubic"),
    Sample((t(0.0, 0.0), inf), name="zero, largest"),
    Sample((r(2, 3, dtype=torch.complex128), 2, [1]), name="complex"),
    Sample((r(),), name="number"),
    Sample((torch.randn(3, 4), 2, [1]), {"dtype": torch.float64}, name="wider", tolerance=1e-6),
]

SAMPLES = {
    aten.amax.default: EXTREME,
    aten.amin.default: EXTREME,
    aten.max.default: TOTAL,
    aten.min.default: TOTAL,
    aten.var.correction: [*VARIANCE, CONSTANT],
    aten.var_mean.correction: [*VARIANCE, CONSTANT],
    aten.std.correction: [*VARIANCE, CONSTANT],
    aten.std_mean.correction: [*VARIANCE, CONSTANT],
    aten.linalg_vector_norm.default: NORM,
    aten.norm.Scalar: [Sample((r(3, 4),)), Sample((r(3, 4), 3))],
    aten.norm.ScalarOpt_dim: [Sample((r(3, 4), None, [1])), Sample((r(3, 4), 1, [0], True))],
    aten.norm.ScalarOpt_dtype: [Sample((r(3, 4), 2), {"dtype": torch.float64})],
    aten.norm.ScalarOpt_dim_dtype: [Sample((r(3, 4), 2, [1], True), {"dtype": torch.float64})],
    aten.dist.default: [Sample((r(3, 4), r(4))), Sample((r(3, 4), r(3, 4), 3), active=[1])],
}
CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)])
def test_rule(op, sample, second_order):
    check(op, sample, second_order)


@pytest.mark.parametrize("order", [0.5, 1, 1.5, 2, 3, -1, inf])
def test_a_norm_has_no_derivative_at_zero(order):
    op = aten.linalg_vector_norm.default
    y = RULES[op](op, Components(2, "plane"), HyperDual(torch.zeros(3), torch.randn(2, 3)), order)
    assert not y.tangent.any()
    assert y.cross is None or not y.cross.any()


@pytest.mark.parametrize(
    "op", [aten.amax.default, aten.var.correction, aten.std.correction, aten.linalg_vector_norm.default]
)
def test_dtype_is_kept(op):
    x = HyperDual(r(3, 4, dtype=torch.bfloat16), r(1, 3, 4, dtype=torch.bfloat16), r(1, 3, 4, dtype=torch.bfloat16))
    y = RULES[op](op, Components(1, "plane"), x)
    assert {y.primal.dtype, y.tangent.dtype, y.cross.dtype} == {torch.bfloat16}


#: Functions that PyTorch writes in terms of the operators above.
FUNCTIONS = {
    "aminmax": lambda x: torch.stack(torch.aminmax(x, dim=1)),
    "var": lambda x: x.var(1),
    "var unbiased": lambda x: x.var(0, unbiased=False, keepdim=True),
    "std": lambda x: x.std(),
    "var_mean": lambda x: torch.cat(torch.var_mean(x, 1)),
    "frobenius": lambda x: torch.linalg.matrix_norm(x),
    "one norm": lambda x: torch.linalg.matrix_norm(x, 1),
    "vector norm": lambda x: torch.linalg.norm(x, 3, dim=0),
    "normalize": lambda x: torch.nn.functional.normalize(x, dim=1),
    "renorm": lambda x: torch.renorm(x, 2, 0, 1.0),
    "cosine": lambda x: torch.nn.functional.cosine_similarity(x[:2], x[1:], dim=1),
    "pairwise": lambda x: torch.nn.functional.pairwise_distance(x[:2], x[1:]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    check(FUNCTIONS[name], Sample((r(3, 4),)))


def test_a_variance_is_one_node_of_the_graph():
    hd = fomoh_fx.transform(lambda x: x.var(1), wrt="inputs")
    trace = hd.trace(r(3, 4), tangents=(r(2, 3, 4),))
    assert [
        n.target for n in trace.stages["normalize"].graph.find_nodes(op="call_function", target=aten.var.correction)
    ]
