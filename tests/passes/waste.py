"""Checking that a final graph computes nothing in vain, and small models to check it on."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import fomoh_fx
from fomoh_fx.passes import provenance
from fomoh_fx.passes.simplify import number_in, value_of
from fomoh_fx.specialization import Specialization

aten = torch.ops.aten
TERMS = {aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar}
FACTORS = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}
#: What a zero tensor may be: the accumulator that something is scattered into.
ACCUMULATE = ("scatter", "index_put", "index_add", "index_copy", "masked_scatter", "select_backward", "slice_backward")


def no_waste(module: fx.GraphModule, is_body: bool = False) -> None:
    """No unused node, no component that is a zero tensor (a body may return one), no term 0, no factor 1."""
    for node in module.graph.nodes:
        where = f"{node.format_node()} ({provenance.of(node)})"
        assert node.users or node.op in ("placeholder", "output"), f"unused: {where}"
        if node.op != "call_function" or provenance.of(node).component == "primal":
            continue
        if isinstance(value_of(node), Tensor) and number_in(node) == 0:
            users = [user for user in node.users if not (is_body and user.op == "output")]
            assert all(any(a in str(user.target) for a in ACCUMULATE) for user in users), f"a zero: {where}"
        if node.target in TERMS:
            assert 0 not in [number_in(argument) for argument in node.args[:2]], f"adds zero: {where}"
        if node.target in FACTORS:
            assert number_in(node.args[1]) != 1, f"multiplies by one: {where}"


class MLP(nn.Module):
    """Two hidden layers, with a method and a container inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.rest = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(x)
        return self.rest(torch.relu(x) * 2)


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv2d(1, 3, 3)
        self.pool = nn.MaxPool2d(2)
        self.out = nn.Linear(27, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.filters(x)))
        return self.out(x.flatten(1))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


#: Models, their inputs, and whether the outputs are classes for cross_entropy.
MODELS = {
    "mlp": (MLP, (torch.randn(6, 4),)),
    "cnn": (CNN, (torch.randn(2, 1, 8, 8),)),
    "encoder": (encoder, (torch.randn(2, 5, 8),)),
}


def compiled(name: str, directions: int = 2, **options: object) -> tuple[fomoh_fx.HyperDualModule, Specialization]:
    """One of the models, traced with random tangents of every parameter."""
    torch.manual_seed(0)
    model, args = MODELS[name][0](), MODELS[name][1]
    hd = fomoh_fx.transform(model, **options)  # type: ignore[arg-type]
    tangents = {n: torch.randn(directions, *p.shape) for n, p in model.named_parameters()}
    targets = (torch.zeros(len(args[0]), dtype=torch.int64),) if "loss" in options else None
    return hd, hd.trace(*args, tangents=tangents, targets=targets)
