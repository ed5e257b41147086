"""Scaled dot-product attention: masks, scaling, grouped queries, dropout; the layers of torch.nn that use it."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import fomoh_fx
from fomoh_fx.passes.dataflow import graphs_in
from fomoh_fx.rules import attention
from fomoh_fx.rules.registry import COMPOSITES
from tests.oracle import relative_error, reverse_over_reverse
from tests.rules.checking import Sample, check

aten = torch.ops.aten
inf = float("inf")


def r(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


Q, K, V = r(2, 2, 3, 4), r(2, 2, 5, 4), r(2, 2, 5, 3)
MASK = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])
ADDED = r(3, 5).masked_fill(~MASK, -inf)
FINITE = r(1, 2, 3, 5)

SAMPLES = {
    aten.scaled_dot_product_attention.default: [
        Sample((Q, K, V)),
        Sample((Q, K, V), active=[1]),
        Sample((r(3, 4), r(5, 4), r(5, 2)), name="no batch"),
        Sample((Q.transpose(0, 2), K[:, :, :3].transpose(0, 2), V[:, :, :3].transpose(0, 2)), name="not contiguous"),
        Sample((Q, K, V, MASK), name="mask"),
        Sample((Q, K, V, ADDED), active=[0, 1, 2], name="added mask"),
        Sample((Q, K, V, FINITE), name="active mask"),
        Sample((Q, K, V), {"is_causal": True}, name="causal"),
        Sample((Q, K, V), {"scale": 0.3}, name="scale"),
        Sample((r(2, 4, 3, 4), K, V), {"enable_gqa": True}, name="grouped queries"),
    ],
    aten._scaled_dot_product_flash_attention_for_cpu.default: [
        Sample((Q, K, r(2, 2, 5, 4)), truth="difference"),
        Sample((Q, K[:, :, :3], r(2, 2, 3, 4), 0.0, True), truth="difference", name="causal"),
        Sample(
            (Q, K, r(2, 2, 5, 4)), {"attn_mask": FINITE[:1, :1], "scale": 0.3}, active=[0, 1, 2], truth="difference"
        ),
    ],
}
CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]
IDS = [f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)]


@pytest.fixture(params=[False, True], ids=["whole", "by rows"])
def by_rows(request, monkeypatch):
    """Two rows at a time, as of long sequences."""
    if request.param:
        monkeypatch.setattr(attention, "MOST_SCORES", 0)
        monkeypatch.setattr(attention, "ROWS", 2)
    return request.param


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=IDS)
def test_rule(op, sample, second_order):
    check(op, sample, second_order)


@pytest.mark.parametrize(("op", "sample"), CASES, ids=IDS)
def test_rule_by_rows(op, sample, monkeypatch):
    """Two rows at a time, as of long sequences."""
    monkeypatch.setattr(attention, "MOST_SCORES", 0)
    monkeypatch.setattr(attention, "ROWS", 2)
    check(op, sample)


@pytest.mark.parametrize(("op", "sample"), CASES, ids=IDS)
def test_primal_equals_the_operator(op, sample, by_rows):
    expected, found = op(*sample.args, **sample.kwargs), COMPOSITES[op](*sample.args, **sample.kwargs)
    torch.testing.assert_close(found, expected)


def sizes(hd):
    """How many numbers the values have, those inside of bodies too."""
    nodes = [n for part in graphs_in(hd.stages["eliminate"]) for n in part.graph.nodes]
    return [n.meta["val"].numel() for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.zeros(1, 1, 1100)}], ids=str)
def test_a_long_sequence_has_no_square_of_scores(options):
    """And is what the fused kernel computes; its mask has no rows, or is made row by row."""
    q, k, v = r(1, 1100, 2), r(1, 1100, 2), r(1, 1100, 2)
    options = {name: x.double() if name == "attn_mask" else x for name, x in options.items()}
    hd = fomoh_fx.transform(lambda q: scaled_dot_product_attention(q, k, v, **options), wrt="inputs")
    out = hd(q, tangents=(r(2, *q.shape),))
    torch.testing.assert_close(out.primal, scaled_dot_product_attention(q, k, v, **options))
    assert max(sizes(hd)) <= 3 * attention.ROWS * 1100 < 1100**2


def test_dropout_takes_all_rows_at_once(monkeypatch):
    """One mask is drawn for all of them."""
    monkeypatch.setattr(attention, "MOST_SCORES", 0)
    monkeypatch.setattr(attention, "ROWS", 2)
    hd = fomoh_fx.transform(lambda q: scaled_dot_product_attention(q, K, V, dropout_p=0.5), wrt="inputs")
    hd(Q, tangents=(r(2, *Q.shape),))
    assert not hd.stages["eliminate"].graph.find_nodes(op="call_function", target=torch.ops.higher_order.map_impl)


@pytest.mark.slow
def test_rows_of_parts_of_one_tensor_compiled(monkeypatch):
    """Queries, keys and values share memory, which the operator that maps over rows forbids."""
    monkeypatch.setattr(attention, "MOST_SCORES", 0)
    monkeypatch.setattr(attention, "ROWS", 2)

    def function(x):
        q, k, v = x.chunk(3, -1)
        return scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()

    x, tangents = r(2, 5, 12), (r(2, 2, 5, 12),)
    hd = fomoh_fx.transform(function, wrt="inputs")
    expected, found = hd(x, tangents=tangents), fomoh_fx.compile(hd)(x, tangents=tangents)
    _, slopes, crosses = reverse_over_reverse(function, [x], tangents)
    for out in (expected, found):
        torch.testing.assert_close(out.tangent, slopes)
        torch.testing.assert_close(out.hessian(), crosses)


def test_a_fully_masked_row_has_no_derivative():
    hd = fomoh_fx.transform(lambda q, k, v: scaled_dot_product_attention(q, k, v, MASK), wrt="inputs")
    out = hd(Q, K, V, tangents=(r(2, *Q.shape), r(2, *K.shape), r(2, *V.shape)))
    for part in (out.primal, out.tangent, out.cross):
        assert part.isfinite().all()
        assert not part[..., 1, :].any()


def test_one_dropout_mask_serves_all_components():
    """With v the identity the output is the dropped-out weights themselves."""
    v = torch.eye(5, dtype=torch.float64)
    hd = fomoh_fx.transform(
        lambda q: (scaled_dot_product_attention(q, K[0, 0], v, dropout_p=0.5), (q @ K[0, 0].T / 2).softmax(-1)),
        wrt="inputs",
    )
    q = r(3, 4)
    first = hd(q, tangents=(r(2, 3, 4),))
    kept = first.primal[0] != 0
    assert 0 < kept.sum() < kept.numel()
    for part in ("primal", "tangent", "cross"):
        dropped, plain = getattr(first, part)
        torch.testing.assert_close(dropped, plain * kept * 2)
    again = hd(q, tangents=(r(2, 3, 4),))
    assert ((again.primal[0] != 0) != kept).any()


def test_half_types_stay():
    q, k, v = (x.bfloat16() for x in (Q, K, V))
    hd = fomoh_fx.transform(lambda q: scaled_dot_product_attention(q, k, v, is_causal=True), wrt="inputs")
    out = hd(q, tangents=(r(1, *q.shape, dtype=torch.bfloat16),))
    assert {out.primal.dtype, out.tangent.dtype, out.cross.dtype} == {torch.bfloat16}
    torch.testing.assert_close(out.primal, scaled_dot_product_attention(q, k, v, is_causal=True), rtol=2e-2, atol=2e-2)


def layer(**options):
    return nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation="gelu", **options).double()


PADDING = torch.tensor([[False, False, True], [False, True, True]])
MODELS = {
    "attention": (lambda m: lambda x: m(x, x, x, need_weights=False)[0], nn.MultiheadAttention(4, 2, batch_first=True)),
    "attention, weights": (lambda m: lambda x: m(x, x, x)[0], nn.MultiheadAttention(4, 2, batch_first=True)),
    "attention, padding": (
        lambda m: lambda x: m(x, x, x, key_padding_mask=PADDING, need_weights=False)[0],
        nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True),
    ),
    "encoder": (lambda m: m, nn.TransformerEncoder(layer(dropout=0.0), 2)),
    "encoder, padding": (
        lambda m: lambda x: m(x, src_key_padding_mask=PADDING),
        nn.TransformerEncoder(layer(dropout=0.0, norm_first=True), 1, enable_nested_tensor=False),
    ),
    "decoder": (
        lambda m: (
            lambda x: m(
                x, x[:, :2], tgt_is_causal=True, tgt_mask=nn.Transformer.generate_square_subsequent_mask(3).double()
            )
        ),
        nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 6, 0.0, batch_first=True), 1),
    ),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_model(name, train, frozen):
    """In evaluation, and without gradients, PyTorch would take a fused path that has no derivative."""
    call, model = MODELS[name]
    model = model.double().train(train).requires_grad_(not frozen)
    x, v = r(2, 3, 4), r(2, 2, 3, 4)
    weights = r(2, 3, 4)

    def function(x):
        return (call(model)(x) * weights).sum()

    with torch.no_grad():
        out = fomoh_fx.transform(function, wrt="inputs")(x, tangents=(v,))
    y, tangent, cross = reverse_over_reverse(function, [x], [v])
    assert relative_error(out.primal, y) < 1e-8
    assert relative_error(out.tangent, tangent) < 1e-8
    assert relative_error(out.hessian(), cross) < 1e-8
