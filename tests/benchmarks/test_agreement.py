"""Contenders that need torch only compute the same on a small model; no times are looked at."""

from functools import partial

import pytest
import torch

from benchmarks import laplacian, problem
from benchmarks.contenders import backprop, mezo, nested, ours
from benchmarks.contenders.base import Absent, Options
from benchmarks.models import MODELS, Model, gpt, images, resnet18, tokens
from benchmarks.problem import TOLERANCES, errors

OPTIONS = Options()


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Compiled contenders run their graphs without Inductor."""
    monkeypatch.setattr(Options, "compile", lambda self, function, **settings: function)


SMALL = {
    "tiny": MODELS["tiny"],
    "gpt": Model("gpt", "gpt", partial(gpt, 8, 2, 1), tokens),
    "resnet18": Model("resnet18", "resnet18", partial(resnet18, 2), partial(images, 3, 32)),
}


@pytest.mark.parametrize(
    ("name", "directions", "curvature"),
    [("tiny", 1, "hessian"), ("tiny", 2, "ggn"), ("tiny", 2, "hessian"), ("gpt", 2, "hessian"), ("resnet18", 1, "ggn")],
)
def test_planes_agree(name, directions, curvature):
    made = problem.make(SMALL[name], 2, directions, curvature, dtype=torch.float64)
    expected = problem.truth(made)
    makers = [ours.eager, nested.eager, nested.traced, backprop.gradient, backprop.checkpointed]
    for maker in [*makers, backprop.gradient_and_product]:
        try:
            run = maker(made, OPTIONS)
        except Absent:
            continue
        found = errors(run.result(), expected)
        assert found and max(found.values()) <= TOLERANCES[torch.float64], (maker, found)


def test_directions_of_low_rank_agree():
    made = problem.make(MODELS["tiny"], 2, 2, "ggn", dtype=torch.float64, rank=1)
    for maker in (ours.plane_by_factors, ours.plane):
        found = errors(maker(made, OPTIONS, compiled=False).result(), problem.truth(made))
        assert max(found.values()) <= TOLERANCES[torch.float64], (maker, found)
    with pytest.raises(Absent, match="--rank"):
        ours.plane_by_factors(problem.make(MODELS["tiny"], 2, 2), OPTIONS)


@pytest.mark.parametrize("maker", [backprop.sgd, backprop.sgd_checkpointed, mezo.step])
def test_steps_start_at_the_same_loss(maker):
    made = problem.make(MODELS["tiny"], 4, 2, dtype=torch.float64)
    found = errors(maker(made.fresh(), OPTIONS).result(), problem.truth(made))
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize("maker", [nested.laplacian_forward, nested.laplacian_hessian])
def test_laplacians_agree(maker):
    model, x = laplacian.make(3, 4, "cpu", torch.float64, width=8)
    found = errors(maker(model, x, OPTIONS).result(), {"laplacian": laplacian.truth(model, x)})
    assert max(found.values()) < 1e-10
