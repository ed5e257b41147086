"""Bilinear rules: products and convolutions."""

import pytest
import torch

from tests.rules.checking import Sample, check

aten = torch.ops.aten


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def ends(*offsets: int) -> torch.Tensor:
    return torch.tensor(offsets, dtype=torch.int32)


SAMPLES = {
    aten.mm.default: [Sample((r(3, 4), r(4, 2))), Sample((r(3, 4), r(4, 2)), active=[1])],
    aten.bmm.default: [Sample((r(2, 3, 4), r(2, 4, 2)))],
    aten.linear.default: [
        Sample((r(3, 4), r(2, 4), r(2))),
        Sample((r(2, 3, 4), r(2, 4), None)),
        Sample((r(4), r(2, 4), r(2)), name="vector"),
        Sample((r(3, 4), r(2, 4), r(2)), active=[1, 2], name="first layer"),
        Sample((r(3, 4), r(2, 4), r(2)), active=[2], name="bias"),
        Sample((r(3, 4), r(2, 4), r(3, 1)), name="a bias for each row"),
        Sample((r(2, 4), r(2, 4), r(2, 1)), active=[2], name="a bias for each of as many rows as columns"),
        Sample((r(3, 4), r(2, 4), r(3, 2)), active=[0, 2], name="a bias for each element"),
        Sample((r(2, 3, 4), r(4), torch.randn((), dtype=torch.float64)), name="one output"),
        Sample((r(4), r(4), None), name="one output of a vector"),
        Sample((r(3, 0), r(2, 0), r(2)), name="no inputs"),
        Sample((r(3, 4), r(0, 4), r(0)), name="no outputs"),
    ],
    aten.convolution.default: [
        Sample((r(2, 4, 5, 5), r(6, 4, 3, 3), r(6), [1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
        Sample((r(2, 4, 6), r(6, 2, 3), r(6), [2], [1], [1], False, [0], 2), name="groups"),
        Sample((r(2, 4, 5), r(4, 3, 3), None, [2], [1], [1], True, [1], 1), name="transposed"),
        Sample((r(2, 4, 5), r(4, 3, 3), r(6), [2], [1], [1], True, [0], 2), name="transposed groups"),
        Sample((r(1, 2, 5, 5), r(3, 2, 3, 3), r(3), [1, 1], [2, 2], [2, 2], False, [0, 0], 1), active=[2], name="bias"),
        Sample((r(1, 2, 3, 3, 3), r(2, 2, 2, 2, 2), r(2), [1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1), name="3d"),
    ],
    aten._convolution.default: [
        Sample((r(2, 4, 5), r(6, 4, 3), r(6), [1], [0], [1], False, [0], 1, False, False, False, False)),
    ],
    aten._grouped_mm.default: [
        Sample(
            (r(8, 4).float(), r(3, 4, 8).float(), ends(2, 2, 8)), active=active, tolerance=1e-5, name=f"active {active}"
        )
        for active in ([0], [1], [0, 1])
    ],
    aten.linalg_cross.default: [Sample((r(2, 3), r(2, 3))), Sample((r(3, 2), r(3, 1)), {"dim": 0}, name="broadcast")],
    aten.addmm.default: [
        Sample((r(3, 2), r(3, 4), r(4, 2))),
        Sample((r(2), r(3, 4), r(4, 2)), {"beta": 2, "alpha": 0.5}, name="bias"),
        Sample((r(3, 2) * float("nan"), r(3, 4), r(4, 2)), {"beta": 0}, active=[1, 2], name="beta 0"),
    ],
    aten.baddbmm.default: [
        Sample((r(2, 3, 2), r(2, 3, 4), r(2, 4, 2)), {"alpha": 0.5}),
        Sample((r(2), r(2, 3, 4), r(2, 4, 2))),
    ],
    aten.addbmm.default: [Sample((r(3, 2), r(2, 3, 4), r(2, 4, 2)), {"beta": 3})],
    aten.addmv.default: [Sample((r(3), r(3, 4), r(4)), {"beta": 0.5, "alpha": 2}), Sample((r(1), r(3, 4), r(4)))],
    aten.addr.default: [Sample((r(3, 4), r(3), r(4)), {"alpha": 2})],
    aten.mv.default: [Sample((r(3, 4), r(4)))],
    aten.dot.default: [Sample((r(4), r(4)))],
    aten.vdot.default: [Sample((r(4), r(4)))],
    aten.outer.default: [Sample((r(3), r(4)))],
    aten.ger.default: [Sample((r(3), r(4)))],
    aten.kron.default: [Sample((r(2, 3), r(3, 2))), Sample((r(2), r(3, 2)), name="ranks")],
    aten.bilinear.default: [
        Sample((r(3, 2), r(3, 4), r(2, 2, 4), r(2))),
        Sample((r(2, 2, 2), r(2, 2, 3), r(2, 2, 3)), active=[0, 2], name="batch axes"),
        Sample((r(3, 2), r(3, 4), r(0, 2, 4)), name="no outputs"),
    ],
    aten._trilinear.default: [Sample((r(3, 2), r(2, 2, 4), r(3, 4), [1, 3], [0], [1, 2], [2, 3]))],
    aten.addcmul.default: [Sample((r(3), r(3), r(3)), {"value": 0.5}), Sample((r(2, 3), r(3), r(2, 1)))],
    aten.addcdiv.default: [Sample((r(3), r(3), r(3).abs() + 1), {"value": 0.5})],
}
CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)])
def test_rule(op, sample, second_order):
    check(op, sample, second_order)


PRODUCTS = {
    "einsum": lambda x, w: torch.einsum("ij,jk,lk->il", x, w, x),
    "tensordot": lambda x, w: torch.tensordot(x.reshape(2, 2, 4), w, 1),
    "matmul": lambda x, w: x.expand(2, 4, 4) @ w,
    "matmul with a vector": lambda x, w: w @ x[0],
    "kron": lambda x, w: torch.kron(x[:2], w[:1]),
    "bilinear": lambda x, w: torch.nn.functional.bilinear(x, w, x.expand(3, 4, 4)),
    "multi_dot": lambda x, w: torch.linalg.multi_dot([x, w, x]),
    "conv1d": lambda x, w: torch.nn.functional.conv1d(x[None], w.reshape(4, 4, 1), padding="same"),
    "conv_transpose2d": lambda x, w: torch.nn.functional.conv_transpose2d(x[None, None], w.reshape(1, 4, 2, 2)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_composed_product(name):
    check(lambda x, w: PRODUCTS[name](x, w), Sample((r(4, 4), r(4, 4))))
