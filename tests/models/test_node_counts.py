"""What the final graph of a two-layer GPT-2 may not contain, and what its size may not depend on."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fomoh_fx
from fomoh_fx.hyperdual import SecondOrder
from fomoh_fx.passes import provenance
from fomoh_fx.passes.simplify import number_in
from fomoh_fx.specialization import Specialization
from tests.models.checking import Problem

aten = torch.ops.aten


@cache
def gpt2(directions: int = 2, second_order: SecondOrder = "plane") -> Specialization:
    pytest.importorskip("transformers")
    from tests.models.test_transformers import CASES

    return traced(CASES["gpt2"].problem(), directions, second_order)


def traced(problem: Problem, directions: int = 2, second_order: SecondOrder = "plane") -> Specialization:
    hd = fomoh_fx.transform(problem.model, problem.loss, second_order=second_order)
    return hd.trace(*problem.args, tangents=problem.directions(directions), targets=problem.targets, **problem.kwargs)


def final(specialization: Specialization) -> fx.GraphModule:
    return list(specialization.stages.values())[-1]


def calls(module: fx.GraphModule, *components: str) -> list[fx.Node]:
    """The nodes that compute something, of the given components only if there are any."""
    found = [n for n in module.graph.nodes if n.op == "call_function"]
    return [n for n in found if not components or provenance.of(n).component in components]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace", None])
def test_the_number_of_nodes_does_not_depend_on_the_number_of_directions(second_order: SecondOrder) -> None:
    few, many = (final(gpt2(k, second_order)) for k in (2, 8))
    assert [n.target for n in calls(few)] == [n.target for n in calls(many)]
    assert len(few.graph.nodes) == len(many.graph.nodes)


def test_final_nodes_for_each_normalised_node() -> None:
    assert len(calls(final(gpt2()))) <= 4.5 * len(calls(gpt2().stages["normalize"]))  # primals, tangents and crosses


def test_every_value_is_used() -> None:
    assert all(n.users for n in calls(final(gpt2())))


def test_no_component_is_zero_adds_zero_or_multiplies_by_one() -> None:
    for node in calls(final(gpt2()), "tangent", "cross"):
        assert number_in(node) != 0, node
        if node.target in (aten.add.Tensor, aten.sub.Tensor):
            assert not any(number_in(a) == 0 for a in node.args), node
        if node.target in (aten.mul.Tensor, aten.div.Tensor):
            assert not any(number_in(a) == 1 for a in node.args), node


def test_first_order_has_no_cross_component() -> None:
    assert not calls(final(gpt2(second_order=None)), "cross")
    assert len(calls(final(gpt2(second_order=None)))) < len(calls(final(gpt2()))) / 1.5


class Convolutional(nn.Module):
    """A linear and a convolution layer, both of them the first that the data meet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.convolution = nn.Linear(4, 3), nn.Conv2d(1, 2, 3)
        self.last = nn.Linear(3 + 8, 2)

    def forward(self, rows: Tensor, images: Tensor) -> Tensor:
        flat = self.convolution(images).flatten(1)
        return self.last(torch.cat([self.first(rows), flat], 1).tanh())


def test_a_first_layer_has_no_cross_component() -> None:
    data: tuple[Any, ...] = (torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 1, 4, 4, dtype=torch.float64))
    module = final(traced(Problem(Convolutional().double(), data)))
    first = {"linear", "conv2d", "convolution", "cat", "view", "flatten", "reshape"}
    crosses = {provenance.of(n).primal for n in calls(module, "cross")}
    assert crosses and not crosses & first, crosses & first
    assert {"linear_1", "tanh"} <= crosses
    assert {"linear"} <= {provenance.of(n).primal for n in calls(module, "tangent")}


def test_embeddings_have_no_cross_component() -> None:
    primals = {provenance.of(n).primal for n in calls(final(gpt2()), "cross")}
    assert not [name for name in primals if name.startswith("embedding")]
