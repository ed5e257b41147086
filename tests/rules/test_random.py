"""Constants, stops, and random operators: one draw serves every component."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fomoh_fx
from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.rules.registry import KINDS, RULES
from tests.rules.checking import Sample, check

aten = torch.ops.aten
GENERATOR = torch.Generator().manual_seed(0)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR)


X, P = r(2, 3), torch.tensor([0.2, 0.7, 0.4], dtype=torch.float64)
ONE, TWO = Sample((X,)), Sample((X, r(3)))

CONSTANTS = {
    **{op: [ONE] for op in (
        aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default, aten.zero.default,
        aten.rand_like.default, aten.randn_like.default,
        aten.sign.default, aten.round.default, aten.floor.default, aten.ceil.default, aten.trunc.default,
        aten.signbit.default, aten.isnan.default, aten.isinf.default, aten.isposinf.default, aten.isneginf.default,
        aten.logical_not.default, aten.any.default, aten.all.default, aten.argmax.default, aten.argmin.default,
        aten.nonzero.default, aten.count_nonzero.default, aten.histc.default, aten.normal_functional.default,
        aten.uniform.default, aten.exponential.default, aten.cauchy.default, aten.log_normal.default,
        aten.detach.default, torch.ops.fomoh_fx.stop_gradient.default,
    )},
    **{op: [TWO] for op in (
        aten.floor_divide.default, aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor,
        aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor, aten.logical_and.default, aten.logical_or.default,
        aten.logical_xor.default, aten.equal.default,
    )},
    **{op: [Sample((X, 2.0))] for op in (
        aten.floor_divide.Scalar, aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar,
        aten.ge.Scalar, aten.full_like.default, aten.fill.Scalar,
    )},
    **{op: [Sample((X, [4]))] for op in (aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default)},
    **{op: [Sample((X, [0, 1]))] for op in (aten.any.dims, aten.all.dims, aten.count_nonzero.dim_IntList)},
    **{op: [Sample((X, 1))] for op in (aten.any.dim, aten.all.dim)},
    aten.sym_size.int: [Sample((X, 0))],
    aten.sym_stride.int: [Sample((X, 0))],
    aten.sym_numel.default: [ONE],
    aten.sym_storage_offset.default: [ONE],
    aten.new_full.default: [Sample((X, [4], 2.0))],
    aten.new_empty_strided.default: [Sample((X, [4], [1]))],
    aten.round.decimals: [Sample((X,), {"decimals": 1})],
    aten.randint_like.default: [Sample((X, 5))],
    aten.randint_like.low_dtype: [Sample((X, 2, 5))],
    aten.geometric.default: [Sample((X, 0.5))],
    aten.bernoulli.default: [Sample((P,))],
    aten.bernoulli.p: [Sample((X, 0.5))],
    aten.bernoulli.Tensor: [Sample((X, P))],
    aten.multinomial.default: [Sample((P, 2))],
    aten.poisson.default: [Sample((P,))],
    aten.normal.Tensor_float: [Sample((X, 2.0))],
    aten.normal.float_Tensor: [Sample((0.0, P))],
    aten.normal.Tensor_Tensor: [Sample((X, P))],
    aten.bucketize.Tensor: [Sample((X, P))],
    aten.bucketize.Scalar: [Sample((0.3, P))],
    aten.searchsorted.Tensor: [Sample((P, r(2)))],
    aten.searchsorted.Scalar: [Sample((P, 0.3))],
}  # fmt: skip

DERIVATIVES = {
    aten.native_dropout.default: [Sample((X, 0.5, False)), Sample((X, 0.0, True)), Sample((X, 1.0, True), name="all")],
    aten.rrelu_with_noise_functional.default: [
        Sample((X, torch.zeros_like(X), 0.1, 0.3), active=[0], outputs=[0], name="evaluation")
    ],
    aten.div.Tensor_mode: [
        Sample((X, r(3)), {"rounding_mode": None}),
        Sample((X, r(3)), {"rounding_mode": "floor"}, truth="difference"),
        Sample((X, r(3)), {"rounding_mode": "trunc"}, truth="difference"),
    ],
    aten.div.Scalar_mode: [Sample((X, 3.0), {"rounding_mode": mode}, truth="difference") for mode in (None, "floor")],
    torch.ops.fomoh_fx.with_value.default: [],
}

SAMPLES = CONSTANTS | DERIVATIVES
TESTED_OTHERWISE = [aten._standard_gamma.default, aten._sample_dirichlet.default]
CASES = [(op, sample) for op, samples in DERIVATIVES.items() for sample in samples]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)])
def test_rule(op, sample, second_order):
    check(op, sample, second_order)


@pytest.mark.parametrize("op", CONSTANTS, ids=str)
def test_constants_have_no_component(op):
    assert KINDS[op] == "constant"
    for sample in CONSTANTS[op]:
        args = pytree.tree_map_only(torch.Tensor, lambda t: HyperDual(t, t[None], t[None]), sample.args)
        results = pytree.tree_leaves(RULES[op](op, Components(1, "plane"), *args, **sample.kwargs))
        expected = pytree.tree_leaves(op(*sample.args, **sample.kwargs))
        for result, value in zip(results, expected, strict=True):
            assert not isinstance(result, HyperDual)
            assert torch.is_tensor(result) == torch.is_tensor(value)
            if torch.is_tensor(value):
                assert (result.dtype, result.shape) == (value.dtype, value.shape)


def dual(x: torch.Tensor) -> HyperDual:
    return HyperDual(x, r(2, *x.shape), r(3, *x.shape))


def test_dropout_has_one_mask():
    x = dual(r(50))
    y, mask = RULES[aten.native_dropout.default](aten.native_dropout.default, Components(2, "plane"), x, 0.25, True)
    for value, part in ((y.primal, x.primal), (y.tangent, x.tangent), (y.cross, x.cross)):
        torch.testing.assert_close(value, part * mask / 0.75)


def test_random_slopes_are_shared():
    op, x = aten.rrelu_with_noise_functional.default, dual(r(50))
    y, slopes = RULES[op](op, Components(2, "plane"), x, torch.zeros(50, dtype=torch.float64), 0.1, 0.3, True)
    assert bool(((slopes >= 0.1) & (slopes <= 1)).all())
    for value, part in ((y.primal, x.primal), (y.tangent, x.tangent), (y.cross, x.cross)):
        torch.testing.assert_close(value, part * slopes)


def test_a_gamma_sample_has_a_first_derivative_only():
    op = aten._standard_gamma.default
    alpha = HyperDual(P, torch.ones(1, 3, dtype=torch.float64))
    y = RULES[op](op, Components(1, None), alpha)
    torch.testing.assert_close(y.tangent[0], aten._standard_gamma_grad(P, y.primal))
    with pytest.raises(UnsupportedOpError, match="second_order=None"):
        RULES[op](op, Components(1, "plane"), alpha)


def test_with_value_takes_the_value_of_one_and_the_derivative_of_the_other():
    op, x, value = torch.ops.fomoh_fx.with_value.default, dual(r(3)), dual(r(3))
    y = RULES[op](op, Components(2, "plane"), x, value)
    assert torch.equal(y.primal, value.primal) and y.tangent is x.tangent and y.cross is x.cross
    assert torch.equal(RULES[op](op, Components(2, "plane"), r(3), value), value.primal)


def test_dropout_in_a_model_draws_anew_at_every_call():
    x, v = torch.ones(200, dtype=torch.float64), torch.ones(1, 200, dtype=torch.float64)
    hd = fomoh_fx.transform(lambda x: torch.nn.functional.dropout(x, 0.5) ** 2, wrt="inputs")
    first, second = hd(x, tangents=(v,)), hd(x, tangents=(v,))
    torch.testing.assert_close(first.tangent[0], 2 * first.primal)
    assert not torch.equal(first.primal, second.primal)


def test_numbers_are_drawn_in_the_order_of_the_model_s_own_layout():
    """PyTorch fills the mask in the order of its argument's memory, which a norm's body lays out in another way."""
    x = torch.randn(2, 3, 4, dtype=torch.float64).transpose(1, 2)

    def model(x):
        return torch.nn.functional.dropout(torch.nn.functional.layer_norm(x, (3,)), 0.5)

    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    out = fomoh_fx.transform(model, wrt="inputs")(x, tangents=(torch.ones(1, 2, 4, 3, dtype=torch.float64),))
    torch.testing.assert_close(out.primal, expected)


def test_a_dirichlet_sample_moves_on_the_simplex():
    """Along x it stays on it, and its sum over the parts is the pathwise derivative that reverse mode has."""
    alpha, v = P * 5, torch.randn(2, 3, dtype=torch.float64, generator=GENERATOR)
    op = aten._sample_dirichlet.default
    torch.manual_seed(0)
    y = RULES[op](op, Components(2, None), HyperDual(alpha, v))
    torch.testing.assert_close(y.tangent.sum(-1), torch.zeros(2, dtype=torch.float64))
    leaf = alpha.clone().requires_grad_()
    torch.manual_seed(0)
    x = torch.distributions.Dirichlet(leaf).rsample()
    torch.testing.assert_close(y.primal, x.detach())
    for i in range(3):
        (slope,) = torch.autograd.grad(x[i], leaf, retain_graph=True)
        torch.testing.assert_close(y.tangent[:, i], v @ slope)
    with pytest.raises(UnsupportedOpError, match="second derivative of a Dirichlet sample is not known"):
        RULES[op](op, Components(2, "plane"), HyperDual(alpha, v))


@pytest.mark.parametrize(
    "layer", [lambda x: F.dropout(x, 1.0), nn.Dropout(1.0), lambda x: F.dropout(x * 1, 1.0, True, True)]
)
def test_a_dropout_of_everything_draws_nothing(layer):
    x = torch.linspace(1, 2, 4, dtype=torch.float64)

    def function(x):
        return (layer(x) + x * torch.rand(4, dtype=torch.float64)).sum()

    torch.manual_seed(0)
    expected = function(x)
    torch.manual_seed(0)
    torch.testing.assert_close(fomoh_fx.transform(function, wrt="inputs")(x, tangents=(x[None],)).primal, expected)
