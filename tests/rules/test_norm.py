"""Normalisation layers: every output, running statistics, half types, and the layers of torch.nn."""

import copy

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.rules.registry import COMPOSITES
from tests.oracle import relative_error, reverse_over_reverse
from tests.rules.checking import Sample, check

aten = torch.ops.aten
EPS = 1e-5


def r(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def first(op):
    """The normalised value alone: PyTorch defines no derivative of the statistics that it saves."""
    return lambda *args: op(*args)[0]


def fresh(op):
    """All but the running statistics, which have no derivative."""
    return lambda *args: op(*args)[:3]


X, W, B = r(3, 4, 2), r(4), r(4)
STATISTICS = (r(4), r(4).square() + 0.1)
SAMPLES = {
    aten.layer_norm.default: [
        Sample((r(2, 3, 4), [4], W, B)),
        Sample((r(2, 3, 4), [3, 4], r(3, 4)), name="two dimensions"),
        Sample((r(4), [4]), name="vector"),
        Sample((r(4, 3).t(), [4], W, B), active=[1, 2], name="parameters"),
    ],
    aten.native_layer_norm.default: [
        Sample((r(2, 4), [4], W, B, EPS), truth="difference"),
        Sample((r(2, 4), [4], None, None, EPS), truth="difference"),
    ],
    aten.group_norm.default: [
        Sample((X, 2, W, B)),
        Sample((r(2, 4), 2), name="no positions"),
        Sample((X, 4, W, B), active=[1, 2], name="parameters"),
    ],
    aten.native_group_norm.default: [
        Sample((X, W, B, 3, 4, 2, 2, EPS), truth="difference"),
        Sample((X, None, None, 3, 4, 2, 1, EPS), truth="difference"),
    ],
    aten.rms_norm.default: [
        Sample((r(2, 3, 4), [4], W)),
        Sample((r(2, 3, 4), [3, 4], None, EPS), name="two dimensions"),
    ],
    aten._fused_rms_norm.default: [Sample((r(2, 4), [4], W, EPS)), Sample((r(2, 4), [4], None, None))],
    aten._native_batch_norm_legit.no_stats: [Sample((X, W, B, True, 0.1, EPS), truth="difference")],
    aten._native_batch_norm_legit_no_training.default: [
        Sample((X, W, B, *STATISTICS, 0.1, EPS), active=[0, 1, 2]),
        Sample((X, None, None, *STATISTICS, 0.1, EPS), active=[0]),
    ],
    aten._native_batch_norm_legit_functional.default: [
        Sample((X, W, B, *STATISTICS, True, 0.1, EPS), active=[0, 1, 2], truth="difference"),
        Sample(
            (r(5, 4), None, None, *STATISTICS, True, 0.3, EPS), active=[0], truth="difference", name="no parameters"
        ),
        Sample((X, W, B, *STATISTICS, False, 0.1, EPS), active=[0, 1, 2], name="evaluation"),
    ],
    aten._batch_norm_with_update_functional.default: [
        Sample((X, W, B, *STATISTICS, 0.1, EPS), active=[0, 1, 2], truth="difference")
    ],
    aten._batch_norm_no_update.default: [Sample((X, W, B, *STATISTICS, 0.1, EPS), active=[0, 1, 2])],
}
UPDATING = (aten._native_batch_norm_legit_functional.default, aten._batch_norm_with_update_functional.default)
CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]
IDS = [f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=IDS)
def test_rule(op, sample, second_order):
    check(fresh(op) if op in UPDATING else op, sample, second_order)


@pytest.mark.parametrize(("op", "sample"), [c for c in CASES if c[1].truth == "difference"])
def test_the_value_against_reverse_mode(op, sample):
    check(first(op), Sample(sample.args, sample.kwargs, sample.active))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["same", "float32", "none"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=IDS)
def test_primal_equals_the_operator_in_every_type(op, sample, dtype, parameters):
    def converted(n, arg):
        if not isinstance(arg, torch.Tensor):
            return arg
        if parameters == "none" and op._schema.arguments[n].name in ("weight", "bias"):
            return None
        return arg.to(dtype if n == 0 or parameters != "float32" else torch.float32)

    args = [converted(n, arg) for n, arg in enumerate(sample.args)]
    expected, found = op(*args, **sample.kwargs), COMPOSITES[op](*args, **sample.kwargs)
    alone = isinstance(expected, torch.Tensor)
    for e, f in zip([expected] if alone else expected, [found] if alone else found, strict=True):
        torch.testing.assert_close(f, e, rtol=2 * torch.finfo(dtype).eps, atol=1e-2 if dtype != torch.float32 else 1e-5)


LAYERS = {
    "layer norm": (nn.LayerNorm(4), (2, 3, 4)),
    "group norm": (nn.GroupNorm(2, 4), (2, 4, 3)),
    "rms norm": (nn.RMSNorm(4), (2, 3, 4)),
    "batch norm": (nn.BatchNorm1d(4), (5, 4)),
    "batch norm 2d": (nn.BatchNorm2d(4, momentum=0.3), (2, 4, 2, 2)),
    "batch norm, no statistics": (nn.BatchNorm1d(4, track_running_stats=False), (5, 4)),
    "batch norm, not affine": (nn.BatchNorm1d(4, affine=False), (5, 4)),
    "instance norm": (nn.InstanceNorm1d(4, affine=True), (2, 4, 3)),
    "instance norm, statistics": (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (2, 4, 3)),
    "local response norm": (nn.LocalResponseNorm(2), (2, 4, 3)),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, train):
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer).double().train(train)
    reference = copy.deepcopy(layer)
    parameters = dict(layer.named_parameters())
    for p in parameters.values():
        torch.nn.init.normal_(p)
    reference.load_state_dict(layer.state_dict())
    x, vs = r(*shape), {n: r(2, *p.shape) for n, p in parameters.items()}
    weights = r(*shape)

    def loss(y):
        return (y.square() * weights).sum()

    if not vs:
        v = r(2, *shape)
        out = fomoh_fx.transform(layer, loss, wrt="inputs")(x, tangents=(v,))
        xs, directions = [x], [v]

        def call(x):
            return loss(copy.deepcopy(reference)(x))

    else:
        out = fomoh_fx.transform(layer, loss)(x, tangents=vs)
        xs, directions = list(parameters.values()), list(vs.values())

        def call(*values):
            named = dict(zip(parameters, values, strict=True))
            return loss(torch.func.functional_call(copy.deepcopy(reference), named, (x,)))

    y, tangent, cross = reverse_over_reverse(call, xs, directions)
    assert relative_error(out.primal, y) < 1e-9
    assert relative_error(out.tangent, tangent) < 1e-9
    assert relative_error(out.hessian(), cross) < 1e-9
    reference(x)
    for buffer, expected in zip(layer.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


def test_a_half_type_stays():
    layer = nn.LayerNorm(4).bfloat16()
    x = r(2, 4, dtype=torch.bfloat16)
    out = fomoh_fx.transform(layer, wrt="inputs")(x, tangents=(r(1, 2, 4, dtype=torch.bfloat16),))
    assert {out.primal.dtype, out.tangent.dtype, out.cross.dtype} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.BatchNorm1d, ()), (nn.BatchNorm2d, (2, 2)), (nn.BatchNorm3d, (1, 2, 2))]
)
def test_averages_over_all_batches(layer, shape):
    """momentum=None: the buffers are as in the model after each call, and the derivative is that of any momentum."""
    torch.manual_seed(0)
    ours = layer(3, momentum=None).double()
    theirs = copy.deepcopy(ours)
    hd = fomoh_fx.transform(ours, lambda y: y.sin().mean())
    weight, v = ours.weight, torch.randn(2, 3).double()
    for training in (True, True, False, True):
        ours.train(training)
        theirs.train(training)
        x = 2 * r(4, 3, *shape) + 1

        def function(w, x=x):
            return torch.func.functional_call(copy.deepcopy(theirs), {"weight": w}, (x,)).sin().mean()

        value, tangent, cross = reverse_over_reverse(function, [weight], [v])
        theirs(x)
        out = hd(x, tangents={"weight": v}, targets=())
        torch.testing.assert_close((out.primal, out.tangent, out.hessian()), (value, tangent, cross))
        for buffer, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(buffer, expected)


class _Reads(nn.Module):
    """A layer whose running statistics are read after it has updated them; reverse mode knows no derivative of them."""

    def __init__(self, norm: nn.Module, read) -> None:
        super().__init__()
        self.norm, self.scale, self.read = norm, nn.Parameter(torch.tensor([0.5, 1.0, 2.0])), read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * self.scale
        return self.read(self.norm, h, self.norm(h.mT).mT)


def _again_in_evaluation(norm: nn.Module, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.batch_norm(h.mT, norm.running_mean, norm.running_var).mT * y


READS = {
    "mean": lambda norm, h, y: norm.running_mean * h.sin(),
    "variance": lambda norm, h, y: norm.running_var * h.sin() * y,
    "twice": lambda norm, h, y: norm((y + h).mT).mT * norm.running_mean,
    "evaluation": _again_in_evaluation,
}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
@pytest.mark.parametrize("read", READS)
def test_running_statistics_that_are_read_have_no_derivative(norm, read):
    model = _Reads(norm(3, track_running_stats=True), lambda *given: READS[read](*given).sum()).double()
    x, v = r(2, 4, 3), r(2, 3)

    def function(scale):
        return torch.func.functional_call(copy.deepcopy(model), {"scale": scale}, (x,))

    value, tangent, cross = reverse_over_reverse(function, [model.scale], [v])
    found = fomoh_fx.transform(model)(x, tangents={"scale": v})
    torch.testing.assert_close((found.primal, found.tangent, found.hessian()), (value, tangent, cross))
