"""Products and cumulative operators along a dimension."""

import pytest
import torch
from torch.export import Dim

import fomoh_fx
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


def expanded(function, x, v, **options):
    return fomoh_fx.transform(function, wrt="inputs", **options)(x, tangents=(v,))


def test_logcumsumexp_has_no_derivative_at_infinity():
    """As logsumexp: from there on it is not a number, in reverse mode as well."""
    x = torch.tensor([1.0, 2.0, torch.inf, 3.0], dtype=torch.float64)
    y = expanded(lambda x: x.logcumsumexp(0), x, torch.ones(1, 4, dtype=torch.float64))
    assert y.primal.isinf().tolist() == [False, False, True, True]
    for part in (y.tangent[0], y.cross[0]):
        assert part.isnan().tolist() == [False, False, True, True]


def test_logcumsumexp_takes_no_part_in_masked_elements():
    v, kept = r(2, 5), [2, 4]
    y = expanded(lambda x: x.logcumsumexp(0), MASKED, v)
    z = expanded(lambda x: x.logcumsumexp(0), MASKED[kept], v[:, kept])
    assert not y.cross[:, 1].any()
    torch.testing.assert_close(y.tangent[:, [2, 3, 4]], z.tangent[:, [0, 0, 1]])
    torch.testing.assert_close(y.cross[:, [2, 3, 4]], z.cross[:, [0, 0, 1]])


RUNNING = {
    "prod": lambda x: x.square().sum(0) * x.prod(0),
    "prod of all": lambda x: x.sin().prod(),
    "prod, kept": lambda x: x.cos().prod(0, keepdim=True) * x,
    "cumprod": lambda x: x.exp().cumprod(0).cumprod(-1),
    "logcumsumexp": lambda x: x.square().logcumsumexp(0),
    "both": lambda x: x.cumprod(0).logcumsumexp(0),
}


@pytest.mark.parametrize("name", RUNNING)
def test_a_dynamic_length(name):
    """One trace serves every length, with zeros as well."""
    function = RUNNING[name]
    hd = fomoh_fx.transform(function, wrt="inputs")
    hd.trace(r(4, 2), tangents=(r(2, 4, 2),), dynamic_shapes={"x": {0: Dim("length", min=2, max=64)}})
    traced = hd.latest
    for length in (2, 3, 8, 13):
        x, v = r(length, 2), r(2, length, 2)
        x[::3] = 0
        y, fixed = hd(x, tangents=(v,)), expanded(function, x, v)
        assert hd.latest is traced
        for part in ("primal", "tangent", "cross"):
            torch.testing.assert_close(getattr(y, part), getattr(fixed, part))


@pytest.mark.parametrize("name", ["prod", "prod of all", "cumprod", "logcumsumexp"])
def test_a_length_that_the_data_decide(name):
    """Also of no elements, and of one."""
    hd = fomoh_fx.transform(lambda x: RUNNING[name](x[x > 0][:, None]).sum() * x.sum(), wrt="inputs")
    for x in (t(1, 2, -1, 3), t(-1, -2, -3, -4), t(-1, 5, -2, -3)):
        v, y = r(2, 4), x[x > 0][:, None]
        out, v_kept = hd(x, tangents=(v,)), v[:, x > 0][:, :, None]
        kept = fomoh_fx.transform(lambda y, z: RUNNING[name](y).sum() * z.sum(), wrt="inputs")
        torch.testing.assert_close(out.cross, kept(y, x, tangents=(v_kept, v)).cross)


@pytest.mark.slow
def test_a_dynamic_length_compiled():
    hd = fomoh_fx.compile(fomoh_fx.transform(RUNNING["both"], wrt="inputs"))
    hd.trace(r(4, 2), tangents=(r(2, 4, 2),), dynamic_shapes={"x": {0: Dim.DYNAMIC}})
    for length in (5, 9):
        x, v = r(length, 2), r(2, length, 2)
        torch.testing.assert_close(hd(x, tangents=(v,)).cross, expanded(RUNNING["both"], x, v).cross)
