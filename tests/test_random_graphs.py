"""Random small graphs of operators that have rules, against reverse-over-reverse.

A graph is a list of steps; each step applies one operator to earlier values and gives one more value of the same
shape, so that any two steps compose. Domains keep elementwise functions away from their singularities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F

import fomoh_fx
from fomoh_fx.hyperdual import SecondOrder
from fomoh_fx.rules.registry import RULES
from tests.oracle import relative_error, reverse_over_reverse

aten = torch.ops.aten
SHAPE = (3, 4)
K = 2


def _positive(x: Tensor) -> Tensor:
    return F.softplus(x) + 0.5


def _unit(x: Tensor) -> Tensor:
    return 0.8 * torch.tanh(x)


#: Where an elementwise operator is evaluated if not on the whole line.
DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(
        ("sqrt", "rsqrt", "log", "log2", "log10", "log1p", "reciprocal", "lgamma", "digamma", "special_entr"), _positive
    ),
    **dict.fromkeys(("asin", "acos", "atanh", "erfinv", "tan", "sinc", "special_erfcx", "expm1", "exp", "exp2"), _unit),
    **dict.fromkeys(("logit", "special_ndtri"), lambda x: 0.1 + 0.8 * torch.sigmoid(x)),
    **dict.fromkeys(("sinh", "cosh", "i0", "special_i1", "square"), _unit),
    "acosh": lambda x: 1 + _positive(x),
}

NO_DOUBLE_BACKWARD = {"hardsigmoid", *(op._opname for op in RULES if "bessel" in str(op))}  # reverse mode has no truth

UNARY = {
    op._opname: op
    for op, rule in RULES.items()
    if isinstance(op, OpOverload) and len(op._schema.arguments) == 1 and getattr(rule, "kind", None) == "elementwise"
    if op._opname not in NO_DOUBLE_BACKWARD
}

BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, w: x + 2 * w,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda x, w: x / _positive(w),
    "pow": lambda x, w: _positive(x) ** _unit(w),
    "atan2": lambda x, w: torch.atan2(x, _positive(w)),
    "hypot": lambda x, w: torch.hypot(x, _positive(w)),
    "logaddexp": torch.logaddexp,
    "maximum": torch.maximum,
    "fmin": torch.fmin,
    "where": lambda x, w: torch.where(x > w, x * w, w),
    "products": lambda x, w: F.linear(x, w) @ w / 4,
    "bmm": lambda x, w: torch.bmm(x.expand(2, *SHAPE), w.mT.expand(2, 4, 3))[1] @ x / 4,
    "attention": lambda x, w: F.scaled_dot_product_attention(x[None], w[None], x[None])[0],
    "lerp": lambda x, w: torch.lerp(x, w, 0.3),
    "cat": lambda x, w: torch.cat([x, w])[2:5],
    "stack": lambda x, w: torch.stack([x, w], 1).flatten(0, 1)[1:4],
    "index_put": lambda x, w: x.index_put((torch.tensor([0, 2]),), w[:2], accumulate=True),
    "scatter": lambda x, w: x.scatter(1, torch.tensor([[1], [0], [3]]), w[:, :1]),
    "mse": lambda x, w: x + F.mse_loss(x, w),
    "convolution": lambda x, w: F.conv1d(x[None], w[:, None, 1:4], padding=1, groups=3)[0],
}

SHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(0),
    "logsumexp": lambda x: x - x.logsumexp(1, keepdim=True),
    "layer_norm": lambda x: F.layer_norm(x, (4,), eps=0.1),
    "rms_norm": lambda x: F.rms_norm(x, (4,), eps=0.1),
    "standardise": lambda x: (x - x.mean(0)) / (x.var(0) + 0.5).sqrt(),
    "norm": lambda x: x / (1 + torch.linalg.vector_norm(x, dim=1, keepdim=True)),
    "prod": lambda x: x * _unit(x).prod(1, keepdim=True),
    "cumsum": lambda x: x.cumsum(1),
    "cumprod": lambda x: _positive(x).cumprod(0),
    "amax": lambda x: x - x.amax(1, keepdim=True),
    "sort": lambda x: x.sort(1).values,
    "topk": lambda x: x.topk(4, 1).values.flip(1),
    "cummax": lambda x: x.cummax(1).values,
    "transpose": lambda x: x.mT.reshape(SHAPE),
    "roll": lambda x: x.roll(1, 0).flip(1),
    "gather": lambda x: x.gather(1, torch.tensor([[0, 0, 1, 3]] * 3)),
    "index": lambda x: x[torch.tensor([2, 0, 0])],
    "pad": lambda x: F.pad(x, (1, 0), mode="constant", value=1.0)[:, :4],
    "max_pool": lambda x: F.max_pool1d(x[None], 3, 1, 1)[0],
    "avg_pool": lambda x: F.avg_pool1d(x[None], 3, 1, 1)[0],
    "interpolate": lambda x: F.interpolate(x[None], 7, mode="linear")[0, :, 1:5],
    "gelu": F.gelu,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "softplus": F.softplus,
    "hardtanh": F.hardtanh,
    "solve": lambda x: torch.linalg.solve(x @ x.mT + 4 * torch.eye(3, dtype=x.dtype), x),
    "logdet": lambda x: x * torch.logdet(x @ x.mT + torch.eye(3, dtype=x.dtype)) / 4,
    "fft": lambda x: torch.fft.rfft(x).abs().sum(1, keepdim=True) - x,
    "matrix_exp": lambda x: torch.matrix_exp(_unit(x[:, :3])) @ x / 4,
}

Step = tuple[str, int, int]


def _apply(step: Step, values: Sequence[Tensor]) -> Tensor:
    name, first, second = step
    x, w = values[first % len(values)], values[second % len(values)]
    if name in UNARY:
        return UNARY[name](DOMAINS[name](x) if name in DOMAINS else x)
    return SHAPED[name](x) if name in SHAPED else BINARY[name](x, w)


def _scalar(steps: Sequence[Step]) -> Callable[..., Tensor]:
    """The graph as a function of its inputs; every value counts, the latest most."""

    def function(*inputs: Tensor) -> Tensor:
        values = list(inputs)
        for step in steps:
            values.append(_apply(step, values))
        weights = torch.linspace(-1.0, 1.0, 12, dtype=inputs[0].dtype).reshape(SHAPE) + 0.1
        return sum((weights * y).sum() / (len(values) - n) for n, y in enumerate(values))  # type: ignore[return-value]

    return function


NAMES = sorted([*UNARY, *BINARY, *SHAPED])
STEPS = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 9), st.integers(0, 9)), min_size=6, max_size=10)


def _graph_of_all(names: Sequence[str]) -> list[Step]:
    """Every operator once, each on the inputs alone."""
    return [(name, n % 2, (n + 1) % 2) for n, name in enumerate(names)]


@given(steps=STEPS, seed=st.integers(0, 2**20), second_order=st.sampled_from(["plane", "diagonal", "trace"]))
@example(steps=[("relu", 0, 0), ("amax", 2, 0), ("sort", 2, 0), ("div", 2, 3)], seed=0, second_order="plane")  # ties
def test_random_graph(steps: list[Step], seed: int, second_order: SecondOrder) -> None:
    _check(
        _scalar(steps), seed, second_order, lambda truth: assume(bool(truth.isfinite().all()) and truth.norm() < 1e8)
    )


def test_every_operator_once() -> None:
    def function(*inputs: Tensor) -> Tensor:
        values = [_apply(step, inputs) for step in _graph_of_all(NAMES)]
        return torch.stack([(y * torch.cos(torch.arange(12.0)).reshape(SHAPE)).sum() for y in values]).sum()

    _check(function, 0, "plane", lambda truth: None)


def _check(
    function: Callable[..., Tensor], seed: int, second_order: SecondOrder, accept: Callable[[Tensor], object]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(SHAPE, dtype=torch.float64, generator=generator) for _ in range(2)]
    directions = [torch.randn(K, *SHAPE, dtype=torch.float64, generator=generator) for _ in inputs]
    value, tangents, crosses = reverse_over_reverse(function, inputs, directions)
    accept(crosses)
    out = fomoh_fx.transform(function, wrt="inputs", second_order=second_order)(*inputs, tangents=tuple(directions))
    expected = {
        "plane": torch.stack([crosses[0, 0], crosses[0, 1], crosses[1, 1]]),
        "diagonal": torch.stack([crosses[0, 0], crosses[1, 1]]),
        "trace": crosses[0, 0] + crosses[1, 1],
    }[str(second_order)]
    assert relative_error(out.primal, value) < 1e-10
    assert relative_error(out.tangent, tangents) < 1e-8
    assert relative_error(out.cross, expected) < 1e-8
