"""Tangents of low rank: exact wherever a parameter goes, and not multiplied out where only products use it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fomoh_fx
from fomoh_fx import ArgumentError, LowRank
from fomoh_fx.low_rank import dense
from fomoh_fx.rules.kinds import bilinear
from fomoh_fx.rules.registry import FACTORED
from tests.models.checking import Problem, truth_of
from tests.oracle import relative_error


class Lambda(nn.Module):
    """A function of parameters ``w`` of these shapes and of the input."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.ParameterList(nn.Parameter(r(*shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.w)


class CrossAttention(nn.Module):
    """Its packed weight is split for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.memory = nn.Parameter(r(4))

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory.expand(len(x), 5, 4)
        return self.attention(x, memory, memory)[0]


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, padding_idx=2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens).tanh() @ self.embedding.weight.T


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False), nn.Tanh(), nn.Linear(3, 2))


MADE: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (mlp(), r(6, 4)),
    "linear over several axes": lambda: (mlp(), r(2, 1, 3, 4)),
    "matrix on the right": lambda: (Lambda(lambda x, v, w: torch.tanh(x @ v) @ w, (4, 3), (3, 2)), r(6, 4)),
    "matrix on the left": lambda: (Lambda(lambda x, v, w: w @ torch.tanh(v @ x), (3, 4), (2, 3)), r(4, 6)),
    "bias added by addmm": lambda: (Lambda(lambda x, w: torch.addmm(x.sin(), x, w, beta=2), (4, 4)), r(6, 4)),
    "transposed": lambda: (Lambda(lambda x, w: F.linear(torch.tanh(F.linear(x, w)), w.t()), (3, 4)), r(6, 4)),
    "permuted": lambda: (Lambda(lambda x, w: (x @ w.permute(1, 0)) @ w.permute(0, 1), (3, 4)), r(6, 4)),
    "transposed in three axes": lambda: (Lambda(lambda x, w: torch.bmm(x, w.transpose(1, 2)), (2, 3, 4)), r(2, 5, 4)),
    "convolution": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2, dilation=2)),
        r(2, 2, 8, 7),
    ),
    "one axis": lambda: (nn.Sequential(nn.Conv1d(2, 3, 3), nn.Sigmoid(), nn.Conv1d(3, 2, 1)), r(2, 2, 6)),
    "convolution in groups": lambda: (nn.Sequential(nn.Conv2d(4, 4, 2, groups=2), nn.Tanh()), r(2, 4, 3, 3)),
    "transposed convolution": lambda: (nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Tanh()), r(2, 2, 3, 3)),
    "rows": lambda: (Lambda(lambda x, w: (x @ w[1:3].T).sin() @ w.chunk(2)[1], (4, 4)), r(5, 4)),
    "columns": lambda: (Lambda(lambda x, w: (x @ w[:, 1:]).sin() @ w.split([1, 3], 1)[1].T, (4, 4)), r(5, 4)),
    "attention": lambda: (CrossAttention(), r(2, 3, 4)),
    "tied embedding": lambda: (TiedLanguageModel(), torch.randint(0, 6, (3, 5))),
    "both factors": lambda: (Lambda(lambda x, v, w: (v @ w).tanh() @ x, (3, 4), (4, 5)), r(5, 2)),
    "elementwise": lambda: (Lambda(lambda x, w: F.linear(x, w / w.norm(dim=1, keepdim=True)), (3, 4)), r(5, 4)),
    "returned": lambda: (Lambda(lambda x, w: w, (3, 4)), r(1)),
    "in a branch": lambda: (
        Lambda(lambda x, w: torch.cond(x.sum() > 0, lambda: (x @ w).sin(), lambda: (x @ w).cos()), (4, 3)),
        r(5, 4),
    ),
}  # fmt: skip


def factored(model: nn.Module, k: int, rank: int) -> dict[str, Tensor | LowRank]:
    """Factors for whatever has two axes or more."""
    return {
        name: LowRank(r(k, p.shape[0], rank), r(k, rank, *p.shape[1:])) if p.dim() > 1 else r(k, *p.shape)
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(("k", "rank"), [(1, 2), (3, 1)])
def test_as_the_oracle_says(name: str, k: int, rank: int) -> None:
    torch.manual_seed(0)
    model, x = MADE[name]()
    truth = "difference" if name == "in a branch" else "reverse"  # PyTorch's backward of cond has no second derivative
    within = 1e-5 if truth == "difference" else 1e-10
    problem = Problem(model.double(), (x,), truth=truth)
    tangents = factored(problem.model, k, rank)
    value, slopes, crosses, _ = truth_of(problem, {name: dense(v) for name, v in tangents.items()})
    for second_order in ("plane", "trace", "diagonal") if k > 1 else ("plane",):
        hd = fomoh_fx.transform(problem.model, problem.loss, second_order=second_order)
        out = hd(x, tangents=tangents)
        torch.testing.assert_close(out.primal, value)
        assert relative_error(out.tangent, slopes) < within
        if second_order == "plane":
            assert relative_error(out.hessian(), crosses) < within
        else:
            diagonal = crosses.diagonal()
            expected = diagonal.sum() if second_order == "trace" else diagonal
            assert relative_error(out.cross, expected) < within


@pytest.mark.parametrize(
    "name", ["mlp", "matrix on the right", "matrix on the left", "transposed", "convolution", "attention", "rows"]
)
@pytest.mark.parametrize("k", [1, 3])
def test_nothing_is_multiplied_out(name: str, k: int) -> None:
    """No product in the final graph has the shape of a parameter's tangents."""
    torch.manual_seed(0)
    model, x = MADE[name]()
    model.double()
    hd = fomoh_fx.transform(model, lambda y: y.square().sum())
    hd(x, tangents=factored(model, k, 1))
    nodes = hd.stages["eliminate"].graph.nodes
    products = [n for n in nodes if n.target in (torch.ops.aten.bmm.default, torch.ops.aten.mul.Tensor)]
    shapes = {tuple(n.meta["val"].shape) for n in products}
    assert products and not shapes & {(k, *p.shape) for p in model.parameters() if p.dim() > 1}
    assert sum("_left" in n.name for n in nodes if n.op == "placeholder") == sum(
        p.dim() > 1 for p in model.parameters()
    )


def test_the_gauss_newton_plane_and_mixed_tangents() -> None:
    torch.manual_seed(0)
    model, x, y = mlp().double(), r(6, 4), torch.randint(0, 2, (6,))
    tangents = factored(model, 2, 1)
    tangents["2.weight"] = dense(tangents["2.weight"])
    full = {name: dense(v) for name, v in tangents.items()}
    hd = fomoh_fx.transform(model, F.cross_entropy, curvature="ggn")
    torch.testing.assert_close(hd(x, tangents=tangents, targets=(y,)).cross, hd(x, tangents=full, targets=(y,)).cross)


def test_another_rank_is_another_signature_and_only_that() -> None:
    model, x = mlp().double(), r(6, 4)
    hd = fomoh_fx.transform(model, lambda y: y.square().sum())
    for rank in (1, 2, 1, 2):
        tangents = factored(model, 2, rank)
        full = {name: dense(v) for name, v in tangents.items()}
        assert relative_error(hd(x, tangents=tangents).cross, hd(x, tangents=full).cross) < 1e-10
    assert len(hd._specializations.values) == 3


@pytest.mark.parametrize("name", ["mlp", "convolution", "tied embedding"])
def test_an_empty_batch(name: str) -> None:
    torch.manual_seed(0)
    model, x = MADE[name]()
    model.double()
    hd = fomoh_fx.transform(model, lambda y: y.square().sum())
    out = hd(x[:0], tangents=factored(model, 2, 1))
    assert not out.tangent.any() and not out.cross.any()


def test_a_dynamic_batch() -> None:
    model = mlp().double()
    hd = fomoh_fx.transform(model, lambda y: y.square().sum())
    tangents = factored(model, 2, 1)
    traced = hd.trace(r(6, 4), tangents=tangents, dynamic_shapes={"input": {0: torch.export.Dim("batch", min=2)}})
    for size in (3, 7):
        x = r(size, 4)
        out = hd(x, tangents=tangents)
        assert hd.latest is traced
        full = fomoh_fx.transform(model, lambda y: y.square().sum())
        expected = full(x, tangents={name: dense(v) for name, v in tangents.items()})
        assert relative_error(out.cross, expected.cross) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("lower", [fomoh_fx.compile, torch.compile])
def test_compiled(lower: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = MADE["convolution"]()
    model.double()
    hd = fomoh_fx.transform(model, lambda y: y.square().sum())
    tangents = factored(model, 2, 1)
    expected = hd(x, tangents=tangents)
    out = lower(hd)(x, tangents=tangents)
    torch.testing.assert_close((out.tangent, out.cross), (expected.tangent, expected.cross))


def test_a_rule_of_the_users_own_serves_these_too() -> None:
    """Nothing here knows what the user's own rule for an operator says."""
    kept = dict(FACTORED)
    op = torch.ops.aten.mm.default
    rules = fomoh_fx.rules.registry.RULES
    before = rules[op]
    try:
        fomoh_fx.register_rule(op, bilinear(0, 1))
        assert op not in FACTORED
        model, x = Lambda(lambda x, w: (x @ w).sin(), (4, 3)), r(5, 4)
        tangents = factored(model, 2, 1)
        hd = fomoh_fx.transform(model, lambda y: y.square().sum())
        full = {name: dense(v) for name, v in tangents.items()}
        assert relative_error(hd(x, tangents=tangents).cross, hd(x, tangents=full).cross) < 1e-12
    finally:
        fomoh_fx.rules.registry.register(op, before, "bilinear")
        FACTORED.update(kept)


@pytest.mark.parametrize(
    ("tangent", "message"),
    [
        (LowRank(r(2, 5, 1), r(2, 1, 4, 1)), r"factors of parameter '0.weight' must have shapes \[K, 5, R\]"),
        (LowRank(r(2, 4, 1), r(2, 1, 4)), r"\[2, 4, 1\] and \[2, 1, 4\]"),
        (LowRank(r(2, 5, 1), r(3, 1, 4)), r"\[2, 5, 1\] and \[3, 1, 4\]"),
        (LowRank(r(2, 5, 2), r(2, 1, 4)), r"\[2, 5, 2\] and \[2, 1, 4\]"),
        (LowRank(r(2, 5, 1), r(2, 1, 4).float()), "dtype torch.float64, got torch.float32"),
        (LowRank(r(2, 5, 1), None), "must be a tensor, got NoneType"),  # type: ignore[arg-type]
        (LowRank(r(0, 5, 1), r(0, 1, 4)), "no direction"),
    ],
)
def test_factors_that_do_not_fit_are_refused(tangent: LowRank, message: str) -> None:
    hd = fomoh_fx.transform(mlp().double(), lambda y: y.sum())
    with pytest.raises(ArgumentError, match=message):
        hd(r(6, 4), tangents={"0.weight": tangent})


def test_a_vector_and_an_input_have_no_factors() -> None:
    hd = fomoh_fx.transform(mlp().double(), lambda y: y.sum())
    with pytest.raises(ArgumentError, match="cannot be LowRank: it has 1 axes"):
        hd(r(6, 4), tangents={"0.bias": LowRank(r(2, 5, 1), r(2, 1))})
    hd = fomoh_fx.transform(torch.sin, wrt="inputs")
    with pytest.raises(ArgumentError, match="only parameters may have these"):
        hd(r(6, 4), tangents=(LowRank(r(2, 6, 1), r(2, 1, 4)),))
