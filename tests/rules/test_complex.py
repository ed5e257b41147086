"""Complex rules: taking values apart, modulus and angle, Fourier transforms; elementwise operators."""

import pytest
import torch

import fomoh_fx
from tests.oracle import relative_error, reverse_over_reverse
from tests.rules.checking import Sample, check

aten = torch.ops.aten
GENERATOR = torch.Generator().manual_seed(0)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR)


def z(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.complex128, generator=GENERATOR)


SAMPLES = {
    aten.abs.default: [
        Sample((r(3),)),
        Sample((torch.tensor([0.0, -1.0, 2.0], dtype=torch.float64),), name="zero"),
        Sample((z(3),), name="complex"),
        Sample((torch.tensor([0.0, 3 - 4j]),), name="complex zero", tolerance=1e-5),
    ],
    aten.sgn.default: [Sample((r(3),)), Sample((z(3),), name="complex")],
    aten.angle.default: [Sample((r(3),)), Sample((z(3),), name="complex")],
    aten.view_as_real.default: [Sample((z(2, 2),))],
    aten.view_as_complex.default: [Sample((r(2, 2),)), Sample((r(3, 2, 2).transpose(0, 1),), name="transposed")],
    aten._conj.default: [Sample((z(2),))],
    aten._conj_physical.default: [Sample((z(2),))],
    aten._neg_view.default: [Sample((r(2),), truth="difference")],
    aten.complex.default: [Sample((r(2), r(3, 1)), active=active) for active in ([0, 1], [0], [1])],
    aten.polar.default: [Sample((r(2), r(2)), active=active) for active in ([0, 1], [0], [1])],
    aten._fft_r2c.default: [Sample((r(2, 4), [1], 0, True)), Sample((r(3, 4), [0, 1], 1, False))],
    aten._fft_c2r.default: [Sample((z(2, 3), [1], 2, 4)), Sample((z(2, 3), [0, 1], 0, 5))],
    aten._fft_c2c.default: [Sample((z(2, 4), [1], 0, True)), Sample((z(3, 2), [0, 1], 2, False))],
}
CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)])
def test_rule(op, sample, second_order):
    check(op, sample, second_order)


def test_arguments_far_apart():
    """PyTorch's sigmoid of a complex number overflows there, and reverse mode gives no number."""
    far = torch.tensor([1e4 + 1j, -1e4 + 2j, 3.0], dtype=torch.complex128)
    v = z(2, 3)
    out = fomoh_fx.transform(lambda x: torch.logaddexp(x, x.roll(1)), wrt="inputs")(far, tangents=(v,))
    torch.testing.assert_close(out.tangent, v[:, [0, 0, 2]])
    assert not out.cross.any()


def test_which_logarithm_of_a_running_sum_is_refused():
    with pytest.raises(fomoh_fx.UnsupportedOpError, match="many logarithms"):
        fomoh_fx.transform(lambda x: torch.logcumsumexp(x, 0), wrt="inputs")(z(3), tangents=(z(1, 3),))


ELEMENTWISE = {
    aten.exp.default: 1, aten.log.default: 1, aten.sin.default: 1, aten.cos.default: 1, aten.tanh.default: 1,
    aten.sqrt.default: 1, aten.rsqrt.default: 1, aten.reciprocal.default: 1, aten.square.default: 1,
    aten.sigmoid.default: 1, aten.neg.default: 1, aten.mul.Tensor: 2, aten.div.Tensor: 2, aten.add.Tensor: 2,
    aten.sub.Tensor: 2, aten.pow.Tensor_Tensor: 2, aten.mm.default: 2, aten.where.self: 2,
}  # fmt: skip


@pytest.mark.parametrize("op", ELEMENTWISE, ids=str)
def test_holomorphic_operators_on_complex_values(op):
    x, w = (z(2, 2), z(2, 2))[: ELEMENTWISE[op]], r(2, 2)
    first = (torch.tensor([True, False]),) if op is aten.where.self else ()
    check(op, Sample((*first, *x)))
    if op in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor):
        check(op, Sample((x[0], w), name="complex and real"))
        check(op, Sample((w, x[0]), name="real and complex"))


def test_a_spectral_layer():
    """fft, a product with a complex weight, modulus, and back."""

    def function(x, weight):
        spectrum = torch.fft.rfft(x) * torch.view_as_complex(weight)
        y = torch.fft.irfft(spectrum * spectrum.abs() + spectrum.real.sum() + spectrum.conj().imag, n=6)
        return (y.tanh() ** 2).sum() + torch.fft.fft2(y.reshape(2, 3)).angle().sum() + spectrum.conj().sgn().real.sum()

    xs = (r(6), r(4, 2))
    vs = (r(2, 6), r(2, 4, 2))
    out = fomoh_fx.transform(function, wrt="inputs")(*xs, tangents=vs)
    y, tangents, crosses = reverse_over_reverse(function, xs, vs)
    assert relative_error(out.primal, y) < 1e-12
    assert relative_error(out.tangent, tangents) < 1e-10
    assert relative_error(out.hessian(), crosses) < 1e-9


def test_an_inverse_transform_of_short_times_of_a_given_length():
    """PyTorch asks whether its window vanishes somewhere, and knows the answer while it captures."""

    def resynthesised(x):
        window = torch.hann_window(7, dtype=x.dtype)
        spectrum = torch.stft(x, 7, 3, window=window, return_complex=True)
        return torch.istft(spectrum * spectrum.abs(), 7, 3, window=window, length=15).square().sum()

    x, v = (torch.randn(*s, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) for s in ([15], [2, 15]))
    out = fomoh_fx.transform(resynthesised, wrt="inputs")(x, tangents=(v,))
    _, slopes, plane = reverse_over_reverse(resynthesised, (x,), (v,))
    torch.testing.assert_close(out.tangent, slopes)
    torch.testing.assert_close(out.hessian(), plane)
