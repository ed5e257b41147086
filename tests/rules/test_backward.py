"""Gradients taken inside a model, through operators whose backward PyTorch has no forward mode for."""

import pytest
import torch
from torch.nn import functional as F

import fomoh_fx
from tests.oracle import reverse_over_reverse

aten = torch.ops.aten


def padded(mode, *amounts):
    return lambda x: F.pad(x, amounts, mode)


#: For each backward the functions that leave it, and the shape of their argument.
SAMPLES = {
    aten.avg_pool2d_backward.default: [
        (lambda x: F.avg_pool2d(x, 2, 1, 1), (2, 2, 4, 3)),
        (lambda x: F.avg_pool2d(x, 2, count_include_pad=False, padding=1), (2, 4, 3)),
        (lambda x: F.avg_pool1d(x, 2), (2, 3, 4)),
        (lambda x: F.lp_pool2d(x, 2, 2), (1, 2, 4, 4)),
        (lambda x: F.local_response_norm(x, 2), (2, 3, 4)),
    ],
    aten.avg_pool3d_backward.default: [(lambda x: F.avg_pool3d(x, 2), (1, 2, 2, 4, 3))],
    aten._adaptive_avg_pool2d_backward.default: [
        (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), (2, 2, 4, 3)),
        (lambda x: F.adaptive_avg_pool2d(x, (2, 2)), (2, 4, 3)),
        (lambda x: F.adaptive_avg_pool1d(x, 2), (2, 2, 5)),
    ],
    aten._adaptive_avg_pool3d_backward.default: [(lambda x: F.adaptive_avg_pool3d(x, 2), (1, 2, 3, 4, 3))],
    aten.reflection_pad1d_backward.default: [(padded("reflect", 2, 1), (2, 2, 4))],
    aten.reflection_pad2d_backward.default: [(padded("reflect", 2, 1, 1, 1), (2, 2, 3, 4))],
    aten.reflection_pad3d_backward.default: [(padded("reflect", 2, 1, 1, 1, 1, 0), (1, 2, 3, 3, 4))],
    aten.replication_pad1d_backward.default: [(padded("replicate", 2, 1), (2, 2, 4))],
    aten.replication_pad2d_backward.default: [(padded("replicate", 2, -1, 1, 0), (2, 2, 3, 4))],
    aten.replication_pad3d_backward.default: [(padded("replicate", 2, 1, 1, 1, 1, 0), (1, 2, 3, 3, 4))],
    aten.hardshrink_backward.default: [(F.hardshrink, (3, 4))],
    aten.softshrink_backward.default: [(F.softshrink, (3, 4))],
    aten.log_sigmoid_backward.default: [
        (F.logsigmoid, (3, 4)),
        (lambda x: F.multilabel_soft_margin_loss(x, torch.ones(3, 4, dtype=torch.float64)), (3, 4)),
    ],
}
TESTED_OTHERWISE = [
    aten._cdist_backward.default, aten._pdist_backward.default,
    aten._new_zeros_with_same_feature_meta.default,  # by tests/capture/test_transforms.py
]  # fmt: skip
EACH = [(op, n) for op, samples in SAMPLES.items() for n in range(len(samples))]


@pytest.mark.parametrize("second_order", ["plane", "trace"])
@pytest.mark.parametrize(("op", "n"), EACH, ids=str)
def test_gradient_inside(op, n, second_order):
    function, shape = SAMPLES[op][n]
    draw = torch.Generator().manual_seed(n)
    x = torch.randn(*shape, dtype=torch.float64, generator=draw)
    v = torch.randn(2, *shape, dtype=torch.float64, generator=draw)

    def penalty(x):
        (slope,) = torch.autograd.grad((function(x) * 1.7).sin().sum(), x, create_graph=True)
        return (slope.cos() * torch.arange(1, x.numel() + 1).reshape(x.shape)).sum()

    hd = fomoh_fx.transform(penalty, wrt="inputs", second_order=second_order)
    out = hd(x, tangents=(v,))
    value, tangent, cross = reverse_over_reverse(penalty, [x], [v])
    torch.testing.assert_close(out.primal, value)
    torch.testing.assert_close(out.tangent, tangent)
    torch.testing.assert_close(*(
        (out.hessian(), cross) if second_order == "plane" else (out.cross, cross.diagonal().sum())
    ))  # fmt: skip


@pytest.mark.parametrize(("op", "n"), EACH, ids=str)
def test_sample_leaves_the_operator(op, n):
    """Else the rule was not what was tested."""
    function, shape = SAMPLES[op][n]

    def gradient(x):
        return torch.autograd.grad(function(x).sin().sum(), x, create_graph=True)[0]

    hd = fomoh_fx.transform(gradient, wrt="inputs")
    x = torch.ones(shape, dtype=torch.float64)
    hd.trace(x, tangents=(x.unsqueeze(0),))
    assert hd.stages["capture"].graph.find_nodes(op="call_function", target=op)


def pairs(x, p):
    """The distances of pdist, by operators that reverse mode differentiates as often as one likes."""
    rows, columns = torch.triu_indices(len(x), len(x), 1)
    return torch.linalg.vector_norm(x[rows] - x[columns], p, -1)


def all_pairs(x, p):
    """Of cdist, likewise."""
    return torch.linalg.vector_norm(x.unsqueeze(-2) - (x + 0.3).square().unsqueeze(-3), p, -1)


DISTANCES = {
    "cdist": (lambda x, p: torch.cdist(x, (x + 0.3).square(), p), all_pairs),
    "pdist": (F.pdist, pairs),
}


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("name", DISTANCES)
def test_forces(name, p):
    """A function of the gradient of an energy of distances: in PyTorch it has no derivative."""
    own, written_out = DISTANCES[name]

    def force(distances):
        def scalar(x):
            energy = distances(x, p).square().mul(0.3).sin().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0].square().sum()

        return scalar

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64, generator=draw)
    v = torch.randn(2, 5, 3, dtype=torch.float64, generator=draw)
    hd = fomoh_fx.transform(force(own), wrt="inputs")
    out = hd(x, tangents=(v,))
    assert hd.stages["capture"].graph.find_nodes(op="call_function", target=getattr(aten, f"_{name}_backward").default)
    value, tangent, cross = reverse_over_reverse(force(written_out), [x], [v])
    torch.testing.assert_close(out.primal, value)
    torch.testing.assert_close(out.tangent, tangent)
    torch.testing.assert_close(out.hessian(), cross)


def test_forces_between_points_that_coincide():
    """A point's distance to itself has no derivative."""

    def force(x):
        energy = (torch.cdist(x, x) * 0.7).sin().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0].square().sum()

    def written_out(x):
        energy = 2 * (pairs(x, 2.0) * 0.7).sin().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0].square().sum()

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64, generator=draw)
    v = torch.randn(2, 4, 3, dtype=torch.float64, generator=draw)
    out = fomoh_fx.transform(force, wrt="inputs")(x, tangents=(v,))
    _, tangent, cross = reverse_over_reverse(written_out, [x], [v])
    torch.testing.assert_close(out.tangent, tangent)
    torch.testing.assert_close(out.hessian(), cross)
