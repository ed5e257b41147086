"""Losses: reductions, weights, ignored targets, kinks; those that PyTorch decomposes through the whole compiler."""

import pytest
import torch
from torch.nn import functional as F

import fomoh_fx
from fomoh_fx.rules.registry import COMPOSITES
from tests.oracle import finite_differences
from tests.rules.checking import Sample, check

aten = torch.ops.aten
NONE, MEAN, SUM = range(3)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


CLASSES = torch.tensor([2, -100, 0, 3])
VALID = torch.tensor([2, 4, 0, 3])
PIXELS = torch.tensor([[[0, 2], [-100, 1]], [[1, 1], [2, -100]]])
LABELS = torch.tensor([[0, 3, -1, 2, 1], [-1, 0, 0, 0, 0], [4, 2, 1, 0, 3], [1, -1, 0, 2, 4]])
FULL = torch.tensor([[2, 2, 2, 2, 2], [0, 3, 3, 0, 3]])  # what torch.export makes of a forward with -1 is wrong
P, W = r(4, 5).softmax(1), r(5).exp()
U = torch.rand(3, 4, dtype=torch.float64)
SAMPLES = {
    aten.cross_entropy_loss.default: [
        Sample((r(4, 5), CLASSES)),
        *[Sample((r(4, 5), VALID, W, n, 0, 0.1), active=[0]) for n in (NONE, MEAN, SUM)],
        Sample((r(4, 5), CLASSES, None, MEAN, -100, 0.1)),
        Sample((r(2, 3, 2, 2), PIXELS), name="pixels"),
        Sample((r(2, 3, 2, 2), PIXELS, r(3).exp(), MEAN, -100, 0.1), active=[0], name="pixels, weights"),
        Sample((r(5), torch.tensor(2)), name="no batch"),
        Sample((r(4, 5), P), name="probabilities"),
        *[Sample((r(4, 5), P, W, n, -100, 0.1), active=[0, 1], name=f"probabilities {n}") for n in (NONE, MEAN, SUM)],
    ],
    aten.nll_loss_forward.default: [
        *[Sample((r(4, 5), CLASSES, W, n, -100), active=[0]) for n in (NONE, MEAN, SUM)],
        Sample((r(4, 5), VALID, None, MEAN, 2)),
        Sample((r(5), torch.tensor(2), None, SUM, -100), name="no batch"),
    ],
    aten.nll_loss2d_forward.default: [
        *[Sample((r(2, 3, 2, 2), PIXELS, r(3).exp(), n, -100), active=[0]) for n in (NONE, MEAN, SUM)],
    ],
    aten.multilabel_margin_loss_forward.default: [
        *[Sample((r(2, 5), FULL, n), truth="difference") for n in (NONE, MEAN, SUM)],
        Sample((r(5), FULL[0], MEAN), truth="difference", name="no batch"),
    ],
    aten.multilabel_margin_loss.default: [
        *[Sample((r(4, 5), LABELS, n), truth="difference") for n in (NONE, MEAN, SUM)],
        Sample((r(5), LABELS[0]), truth="difference", name="no batch"),
    ],
    aten.smooth_l1_loss.default: [
        *[Sample((r(3, 4), r(3, 4), n, 0.7)) for n in (NONE, MEAN, SUM)],
        Sample((t(0.0, 0.7, -0.7, 2.0), t(0.0, 0.0, 0.0, 2.0), NONE, 0.7), name="kinks"),
        Sample((r(4), r(4), MEAN, 0.0), name="absolute values"),
    ],
    aten.huber_loss.default: [
        *[Sample((r(3, 4), r(3, 4), n, 0.7)) for n in (NONE, MEAN, SUM)],
        Sample((t(0.0, 0.7, -0.7, 2.0), t(0.0, 0.0, 0.0, 2.0), NONE, 0.7), name="kinks"),
    ],
    aten.binary_cross_entropy.default: [
        *[Sample((U, U.flip(0), None, n), active=[0]) for n in (NONE, MEAN, SUM)],
        *[Sample((U, U.flip(0), r(4), n), active=[0]) for n in (NONE, MEAN, SUM)],
        Sample((U, U.flip(0)), active=[1], name="target"),
        Sample((0.25 + U / 2, U.flip(0)), truth="difference", name="both"),
        Sample((t(0.0, 1.0), t(0.0, 1.0)), active=[0], name="certain and right"),
        Sample((t(0.0, 1.0), t(1.0, 0.0)), active=[0], name="certain and wrong", tolerance=1e-8),
        Sample((t(0.3)[0], t(0.6)[0]), active=[0], name="number"),
    ],
}
CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]
IDS = [f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=IDS)
def test_rule(op, sample, second_order):
    check(op, sample, second_order)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("op", "sample"), [c for c in CASES if c[0] in COMPOSITES])
def test_primal_equals_the_operator(op, sample, dtype):
    if dtype == torch.bfloat16 and "multilabel" in str(op):
        pytest.skip("PyTorch has no kernel")
    args = [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in sample.args]
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(COMPOSITES[op](*args), op(*args), rtol=tolerance, atol=tolerance)


X, Y = r(4, 5), r(4, 5)
SIGNS = torch.sign(r(4, 5))
FUNCTIONS = {
    "cross_entropy": lambda x: F.cross_entropy(x, CLASSES),
    "nll_loss": lambda x: F.nll_loss(x.log_softmax(1), VALID, ignore_index=2),
    "mse_loss": lambda x: F.mse_loss(x, Y),
    "l1_loss": lambda x: F.l1_loss(x, Y, reduction="sum"),
    "smooth_l1_loss": lambda x: F.smooth_l1_loss(x, Y),
    "huber_loss": lambda x: F.huber_loss(x, Y, delta=0.3),
    "kl_div": lambda x: F.kl_div(x.log_softmax(1), Y.softmax(1), reduction="batchmean"),
    "kl_div, log target": lambda x: F.kl_div(Y.log_softmax(1), x.log_softmax(1), log_target=True, reduction="sum"),
    "kl_div, zeros": lambda x: F.kl_div(x.log_softmax(1), Y.relu(), reduction="sum"),
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(x.sigmoid(), Y.sigmoid()),
    "binary_cross_entropy_with_logits": lambda x: F.binary_cross_entropy_with_logits(
        x, Y.sigmoid(), weight=W, pos_weight=W.flip(0)
    ),
    "soft_margin_loss": lambda x: F.soft_margin_loss(x, SIGNS),
    "multi_margin_loss": lambda x: F.multi_margin_loss(x, VALID, p=2, weight=W),
    "multilabel_soft_margin_loss": lambda x: F.multilabel_soft_margin_loss(x, SIGNS.relu()),
    "margin_ranking_loss": lambda x: F.margin_ranking_loss(x, Y, SIGNS, margin=0.5),
    "hinge_embedding_loss": lambda x: F.hinge_embedding_loss(x, SIGNS),
    "cosine_embedding_loss": lambda x: F.cosine_embedding_loss(x, Y, SIGNS[:, 0], margin=-0.5),
    "triplet_margin_loss": lambda x: F.triplet_margin_loss(x, Y, Y.flip(0), swap=True),
    "triplet_margin_with_distance_loss": lambda x: F.triplet_margin_with_distance_loss(x, Y, Y.flip(0)),
    "poisson_nll_loss": lambda x: F.poisson_nll_loss(x, Y.exp().round(), full=True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    truth = "difference" if name in ("multi_margin_loss", "multilabel_margin_loss") else "reverse"
    check(FUNCTIONS[name], Sample((X,), truth=truth))


def test_labels_after_the_last_one_do_not_count():
    op = aten.multilabel_margin_loss_forward.default
    torch.testing.assert_close(COMPOSITES[op](X, LABELS, NONE), op(X, LABELS, NONE))


def test_logits_that_are_zero_keep_their_curvature():
    check(lambda x: F.binary_cross_entropy_with_logits(x, Y.sigmoid()), Sample((torch.zeros_like(X),)))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_ignored_rows_leak_nothing(label_smoothing):
    x, v = X.clone(), r(2, 4, 5)
    x[1] = torch.nan

    def loss(x):
        return F.cross_entropy(x, CLASSES, label_smoothing=label_smoothing)

    out = fomoh_fx.transform(loss, wrt="inputs")(x, tangents=(v,))
    expected = fomoh_fx.transform(loss, wrt="inputs")(X, tangents=(v,))
    for part in ("primal", "tangent", "cross"):
        torch.testing.assert_close(getattr(out, part), getattr(expected, part))


def test_ctc_loss_with_lengths_that_are_read_at_every_call():
    targets, sizes, lengths = torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])
    x, v = r(4, 5), r(2, 4, 5)

    def loss(x):
        return F.ctc_loss(x[:, None].log_softmax(-1), targets, sizes, lengths)

    hd = fomoh_fx.transform(loss, wrt="inputs")
    for length in (2, 1):
        lengths.fill_(length)
        out = hd(x, tangents=(v,))
        value, slopes, crosses = finite_differences(loss, [x], [v])
        torch.testing.assert_close(out.primal, value)
        torch.testing.assert_close(out.tangent, slopes, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out.hessian(), crosses, rtol=1e-5, atol=1e-5)
