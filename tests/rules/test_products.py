"""Products of sums in place of sums of products: as exact, and fewer."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import fomoh_fx
from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.rules import products
from fomoh_fx.rules.registry import RULES
from tests.rules.checking import Sample, check

aten = torch.ops.aten


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


CASES = [
    (aten.mm.default, Sample((r(3, 4), r(4, 2)))),
    (aten.linear.default, Sample((r(3, 4), r(2, 4), r(2)))),
    (aten.linear.default, Sample((r(2, 3, 4), r(2, 4), None))),
    (aten.linear.default, Sample((r(2, 3, 4), r(4), torch.randn((), dtype=torch.float64)))),
    (aten.linear.default, Sample((r(3, 4), r(2, 4), r(2)), active=[0, 1])),
]


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_the_rule_by_sums_agrees_with_the_oracle(monkeypatch, op, sample, second_order, directions):
    monkeypatch.setattr(products, "WORTH_ADDING", 0)
    check(op, sample, second_order, directions)


def expanded(x, w, second_order="plane", sums=True):
    """The components of linear(x, w) from HyperDuals, by sums or plainly."""
    directions = x.tangent.shape[0]
    limit, products.WORTH_ADDING = products.WORTH_ADDING, 0 if sums else torch.inf
    try:
        return RULES[aten.linear.default](aten.linear.default, Components(directions, second_order), x, w)
    finally:
        products.WORTH_ADDING = limit


def factors(k=3, n=64, d=96, m=48, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    x = HyperDual(
        torch.randn(n, d, dtype=dtype),
        torch.randn(k, n, d, dtype=dtype),
        torch.randn(k * (k + 1) // 2, n, d, dtype=dtype),
    )
    return x, HyperDual(torch.randn(m, d, dtype=dtype), torch.randn(k, m, d, dtype=dtype))


def converted(value, dtype):
    return HyperDual(*(None if p is None else p.to(dtype) for p in (value.primal, value.tangent, value.cross)))


def error(value, truth):
    return ((value.double() - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).max().item()


@pytest.mark.parametrize("x_size", [1e-12, 1e-3, 1.0, 1e3, 1e12])
@pytest.mark.parametrize("w_size", [1e-12, 1e-3, 1.0, 1e3, 1e12])
def test_rounding_stays_within_a_small_multiple_of_the_plain_form(x_size, w_size):
    """Also with tangents much larger or smaller than the values, and directions of very different sizes."""
    x, w = factors()
    spread = torch.tensor([1.0, 1e-4, 1e3]).reshape(3, 1, 1)
    x.tangent, w.tangent = x.tangent * x_size * spread, w.tangent * w_size * spread
    truth = expanded(converted(x, torch.float64), converted(w, torch.float64), sums=False)
    plain, by_sums = expanded(x, w, sums=False), expanded(x, w)
    for part in ("tangent", "cross"):
        assert error(getattr(by_sums, part), getattr(truth, part)) < 8 * error(
            getattr(plain, part), getattr(truth, part)
        ), part


def one_of_each(x, w):
    """Directions of a single entry in each factor, in one column."""
    x.tangent[:2], w.tangent[:2] = 0, 0
    x.tangent[0, 3, 5] = w.tangent[0, 2, 5] = 1
    x.tangent[1, :, 7] = w.tangent[1, 4, 7] = 1


def outlier(x, w):
    x.primal[0, 0] = 1e6
    w.tangent[0] = 0


def without_a_part(x, w):
    w.tangent[0] = 0
    w.tangent[1] *= 1e-6


def adapter(x, w):
    """A factor that is zero, as in low-rank adaptation."""
    w.primal.zero_()
    x.tangent[0] = 0
    x.tangent[1] *= 1e-3


def huge(x, w):
    for factor in (x, w):
        factor.primal *= 1e15
        factor.tangent *= 1e-5


def tiny(x, w):
    for factor in (x, w):
        factor.primal *= 1e-12
        factor.tangent *= 1e12


def far_apart(x, w):
    """More than 2^100 between values and tangents."""
    x.primal *= 1e18
    x.tangent *= 1e-18
    w.primal *= 1e15
    w.tangent *= 1e-15


@pytest.mark.parametrize("change", [one_of_each, outlier, without_a_part, adapter, huge, tiny, far_apart])
def test_rounding_has_the_bound_of_the_plain_form(change):
    """A small multiple of the unit roundoff, times ||x_i|| ||w_j|| + ||x_j|| ||w_i||."""
    x, w = factors()
    x.cross = torch.zeros_like(x.cross)
    change(x, w)
    by_sums = expanded(x, w)
    x, w = converted(x, torch.float64), converted(w, torch.float64)
    truth = expanded(x, w, sums=False)
    xs, ws = ([f.primal.norm(), *(t.norm() for t in f.tangent)] for f in (x, w))
    unit = torch.finfo(torch.float32).eps
    for i, (found, right) in enumerate(zip(by_sums.tangent, truth.tangent, strict=True), 1):
        assert (found.double() - right).norm() <= 2 * unit * (xs[i] * ws[0] + xs[0] * ws[i]), i
    pairs = Components(3, "plane").pairs
    for (i, j), found, right in zip(pairs, by_sums.cross, truth.cross, strict=True):
        assert (found.double() - right).norm() <= 2 * unit * (xs[i + 1] * ws[j + 1] + xs[j + 1] * ws[i + 1]), (i, j)


def test_pairs_stay_in_range_where_the_product_of_the_values_does_not():
    x, w = factors()
    x.cross = torch.zeros_like(x.cross)
    x.primal, w.primal = x.primal * 1e-30, w.primal * 1e-30
    by_sums = expanded(x, w)
    assert (by_sums.primal == 0).all()
    truth = expanded(converted(x, torch.float64), converted(w, torch.float64), sums=False)
    assert error(by_sums.cross, truth.cross) < 1e-6


def test_tangents_far_from_the_values_in_float64():
    x, w = factors(dtype=torch.float64)
    for factor in (x, w):
        factor.primal, factor.tangent = factor.primal * 1e80, factor.tangent * 1e-80
    x.cross = torch.zeros_like(x.cross)
    by_sums, plain = expanded(x, w), expanded(x, w, sums=False)
    torch.testing.assert_close(by_sums.tangent, plain.tangent, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(by_sums.cross * 1e160, plain.cross * 1e160, rtol=1e-9, atol=1e-11)


def test_a_tangent_of_zeros():
    x, w = factors()
    x.tangent[0], w.tangent[1] = 0, 0
    x.tangent[2], w.tangent[2] = 0, 0
    truth = expanded(converted(x, torch.float64), converted(w, torch.float64), sums=False)
    by_sums = expanded(x, w)
    assert error(by_sums.tangent[:2], truth.tangent[:2]) < 1e-5
    assert torch.equal(by_sums.tangent[2], torch.zeros_like(by_sums.tangent[2]))
    assert error(by_sums.cross, truth.cross) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_its_direction(bad):
    x, w = factors()
    clean = expanded(x, w)
    x.primal[3], x.tangent[1, 5] = bad, bad
    by_sums = expanded(x, w)
    others = [n for n in range(64) if n not in (3, 5)]
    torch.testing.assert_close(by_sums.tangent[:, others], clean.tangent[:, others])
    torch.testing.assert_close(by_sums.cross[:, others], clean.cross[:, others], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(by_sums.tangent[::2, 5], clean.tangent[::2, 5])
    torch.testing.assert_close(by_sums.cross[[0, 2, 5], 5], clean.cross[[0, 2, 5], 5], rtol=1e-4, atol=1e-3)


def multiplications(hd, x, tangents, y):
    """Of all matrix products that one evaluation does."""
    hd(x, tangents=tangents, targets=(y,))
    with FlopCounterMode(display=False) as counter:
        hd(x, tangents=tangents, targets=(y,))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("k", "inner"), [(1, 4), (2, 9), (3, 16), (8, 81)])
def test_an_inner_layer_takes_fewer_products(k, inner):
    """1 + K first-order ones, the pairs, and those with the cross components, K (K + 1) / 2 each."""
    torch.manual_seed(0)
    width, n = 256, 256
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    hd = fomoh_fx.transform(model, functional.mse_loss)
    tangents = {name: torch.randn(k, *p.shape) for name, p in model.named_parameters()}
    x, y = torch.randn(n, width), torch.randn(n, width)
    assert multiplications(hd, x, tangents, y) == (1 + k + inner) * n * width * width


def test_small_products_are_taken_plainly():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    hd = fomoh_fx.transform(model, functional.mse_loss)
    x, y = torch.randn(32, 8), torch.randn(32, 8)
    tangents = {name: torch.randn(3, *p.shape) for name, p in model.named_parameters()}
    assert multiplications(hd, x, tangents, y) == 32 * 8 * 16 * (4 + 1 + 6 + 9 + 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_half_precision_and_complex_numbers_are_multiplied_plainly(dtype):
    x, w = factors(dtype=dtype)
    for part in ("tangent", "cross"):
        torch.testing.assert_close(
            getattr(expanded(x, w), part), getattr(expanded(x, w, sums=False), part), rtol=0, atol=0
        )


def test_sums_that_would_fill_the_memory_are_not_made(monkeypatch):
    x, w = factors(k=3, n=64, d=96, m=48)
    assert products.fewer_products_pay(
        forms := products.Forms(None, None, None, print, 100.0), Components(3, "plane"), x, w
    )
    monkeypatch.setattr(products, "MOST_SUMS", 9 * (64 * 96 + 48 * 96) - 1)
    assert not products.fewer_products_pay(forms, Components(3, "plane"), x, w)
    assert products.fewer_products_pay(forms, Components(3, "diagonal"), x, w)


def test_tf32_is_multiplied_plainly():
    """Its factors are rounded to ten bits, which the sums must not be."""
    x, w = factors()
    previous = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        by_sums = expanded(x, w)
    finally:
        torch.set_float32_matmul_precision(previous)
    torch.testing.assert_close(by_sums.cross, expanded(x, w, sums=False).cross, rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="needs settings for each backend")
def test_precision_that_was_set_for_each_backend():
    """PyTorch then refuses to tell the one for all."""
    x, w = factors(n=256, d=256, m=256)
    previous = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        by_sums = RULES[aten.linear.default](aten.linear.default, Components(3, "plane"), x, w)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = previous
    assert by_sums.cross.isfinite().all()


def test_a_dynamic_batch_is_weighed_at_its_first_size():
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256))
    hd = fomoh_fx.transform(model, functional.mse_loss)
    tangents = {name: torch.randn(2, *p.shape) for name, p in model.named_parameters()}
    x, y = torch.randn(256, 256), torch.randn(256, 256)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(y, 0)
    hd(x, tangents=tangents, targets=(y,))
    counts = [multiplications(hd, x[:n], tangents, y[:n]) for n in (64, 128)]
    assert counts == [(1 + 2 + 9) * n * 256 * 256 for n in (64, 128)]
