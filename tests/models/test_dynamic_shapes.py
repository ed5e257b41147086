"""Whole models traced once with a dynamic batch (and sequence length), and run at other sizes, against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import fomoh_fx
from fomoh_fx.errors import CaptureError
from fomoh_fx.seeds import positional_names
from fomoh_fx.transform import HyperDualModule
from tests.models.checking import Problem, check_call
from tests.models.models import PROBLEMS

Place = tuple[int, int]  # the number of a leaf of the call, and one of its dimensions


@dataclass(frozen=True)
class Axis:
    """Dimensions of one size that vary together (a batch, a length), and two other sizes that they can have."""

    size: int
    places: tuple[Place, ...]
    others: tuple[int, int]


def leaves_of(problem: Problem) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten((problem.args, problem.kwargs, problem.targets))


def resized(problem: Problem, sizes: dict[Place, int]) -> Problem:
    """The problem with other sizes: its own values, repeated or cut."""
    leaves, spec = leaves_of(problem)
    for (leaf, dim), size in sizes.items():
        x = leaves[leaf]
        other = x.index_select(dim, torch.arange(size) % x.shape[dim])
        leaves[leaf] = other.sort().values if _ascends(x) else other  # offsets stay offsets
    args, kwargs, targets = pytree.tree_unflatten(leaves, spec)
    return replace(problem, args=args, kwargs=kwargs, targets=targets)


def _ascends(x: Tensor) -> bool:
    return x.dim() == 1 and not x.is_floating_point() and bool((x == x.sort().values).all())


def runs(problem: Problem, sizes: dict[Place, int]) -> bool:
    problem = resized(problem, sizes)
    try:
        problem.loss(problem.model(*problem.args, **problem.kwargs), *problem.targets)
    except Exception:
        return False
    return True


def axis_through(problem: Problem, start: Place, taken: set[Place]) -> Axis | None:
    """The widest set of dimensions around one at whose other sizes the model can be called."""
    leaves, _ = leaves_of(problem)
    size = leaves[start[0]].shape[start[1]]
    if size < 2:
        return None
    every = {
        (i, d) for i, x in enumerate(leaves) if isinstance(x, Tensor) for d in range(x.dim()) if x.shape[d] == size
    }
    rest = sorted(every - taken - {start})
    for others in ((size + 1, size - 1 if size > 2 else size + 2), (size + 1, size + 2)):
        for count in range(len(rest), -1, -1):
            for chosen in combinations(rest, count):
                places = (start, *chosen)
                if all(runs(problem, dict.fromkeys(places, n)) for n in others):
                    return Axis(size, places, others)
    return None


def axes_of(problem: Problem) -> list[Axis]:
    """The batch, sequence lengths and what else the model allows among the first two dimensions of each tensor."""
    problem = replace(problem, model=deepcopy(problem.model))  # the runs update its buffers
    leaves, _ = leaves_of(problem)
    axes: list[Axis] = []
    taken: set[Place] = set()
    for start in ((i, d) for i, x in enumerate(leaves) if isinstance(x, Tensor) for d in range(min(x.dim(), 2))):
        axis = None if start in taken else axis_through(problem, start, taken)
        if axis is not None:
            axes.append(axis)
            taken |= set(axis.places)
    return axes


def dynamic_shapes(problem: Problem, axes: Sequence[Axis]) -> dict[str, Any]:
    """The axes as ``torch.export`` takes them, by the names of the arguments."""
    leaves, spec = leaves_of(problem)
    shapes: list[Any] = [{} if isinstance(x, Tensor) else None for x in leaves]
    for leaf, dim in (place for axis in axes for place in axis.places):
        shapes[leaf][dim] = Dim.DYNAMIC
    args, kwargs, targets = pytree.tree_unflatten(shapes, spec)
    named = dict(zip(positional_names(problem.model, len(args)), args, strict=True))
    return {**named, **kwargs, "targets": targets}


class Flat(nn.Module):
    """The model and its loss as a function of the leaves of one call: what export is asked to capture."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model, self.problem = problem.model, problem

    def forward(self, *tensors: Tensor) -> Tensor:
        leaves, spec = leaves_of(self.problem)
        given = iter(tensors)
        filled = [next(given) if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs, targets = pytree.tree_unflatten(filled, spec)
        return self.problem.loss(self.model(*args, **kwargs), *targets)


def exports(problem: Problem, axes: Sequence[Axis]) -> bool:
    """Whether torch.export itself captures the problem with these axes dynamic."""
    leaves, _ = leaves_of(problem)
    shapes: list[dict[int, Any]] = [{} for _ in leaves]
    for leaf, dim in (place for axis in axes for place in axis.places):
        shapes[leaf][dim] = Dim.DYNAMIC
    tensors = [(x.clone(), s) for x, s in zip(leaves, shapes, strict=True) if isinstance(x, Tensor)]
    dims = tuple(s for _, s in tensors)
    try:
        torch.export.export(Flat(problem), tuple(x for x, _ in tensors), dynamic_shapes=(dims,), strict=False)
    except Exception:
        return False
    return True


def trace(problem: Problem, axes: Sequence[Axis], lower: Callable[[Any], Any]) -> HyperDualModule:
    hd = lower(fomoh_fx.transform(problem.model, problem.loss, wrt=problem.wrt))
    call = {"tangents": problem.directions(2), "targets": problem.targets, **problem.kwargs}
    hd.trace(*problem.args, **call, dynamic_shapes=dynamic_shapes(problem, axes))
    return hd


def trace_widest(problem: Problem, lower: Callable[[Any], Any]) -> tuple[HyperDualModule, list[Axis]]:
    """Traced with every axis dynamic, or where that is refused with as many as torch.export itself captures."""
    axes = axes_of(problem)
    try:
        return trace(problem, axes, lower), axes
    except CaptureError:
        together: list[Axis] = []
        for axis in axes:
            if exports(problem, [*together, axis]):
                together.append(axis)
        assert together != axes, "torch.export captures what was refused"
        if not together:
            raise
        return trace(problem, together, lower), together


def check_dynamic(problem: Problem, lower: Callable[[Any], Any] = lambda hd: hd) -> None:
    """Trace once, call at two other sizes of every axis: right, and served by what was traced."""
    try:
        hd, axes = trace_widest(problem, lower)
    except CaptureError as error:
        assert str(error).startswith("dynamic_shapes: torch.export does not capture them")
        pytest.skip("torch.export itself fixes every dimension")
    if not axes:
        pytest.skip("the model takes one size only")
    traced = hd.latest
    for which in (0, 1):
        sizes = {place: axis.others[which] for axis in axes for place in axis.places}
        check_call(hd, resized(problem, sizes))
        assert hd.latest is traced, f"another specialisation was made for {sizes}"


#: More than five seconds each.
SLOW = [
    "transformer", "transformer_train", "transformer_encoder_train", "transformer_encoder_dropout",
    "transformer_encoder_eval", "tacotron", "frozen_features_with_a_bottleneck", "gru", "speech_with_alignment_loss",
    "experts_by_rows", "tabular_transformer", "attention_pooling", "receptance_weighted_key_value", "linear_attention",
    "low_rank_adaptation", "parametrised_weights", "set_prediction", "retention", "point_net", "recurrent_cells",
]  # fmt: skip
MARKS = dict.fromkeys(SLOW, (pytest.mark.slow, pytest.mark.by_turns))


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, ())) for n in PROBLEMS])
def test_eager(name: str) -> None:
    check_dynamic(PROBLEMS[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "batch_norm_train", "paper_cnn"])
def test_compiled(name: str) -> None:
    check_dynamic(PROBLEMS[name](), lower=fomoh_fx.compile)
