"""Whole models traced once with a dynamic batch (and sequence length), and run at other sizes, against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        leaves[leaf] = leaves[leaf].index_select(dim, torch.arange(size) % leaves[leaf].shape[dim])
    args, kwargs, targets = pytree.tree_unflatten(leaves, spec)
    return replace(problem, args=args, kwargs=kwargs, targets=targets)


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
    hd, axes = trace_widest(problem, lower)
    traced = hd.latest
    for which in (0, 1):
        sizes = {place: axis.others[which] for axis in axes for place in axis.places}
        check_call(hd, resized(problem, sizes))
        assert hd.latest is traced, f"another specialisation was made for {sizes}"


#: torch.export captures none of them with a dynamic dimension: they differentiate inside the model.
REFUSED = ["physics_informed", "physics_informed_by_autograd"]


@pytest.mark.parametrize("name", PROBLEMS)
def test_eager(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(CaptureError, match="dynamic_shapes: "):
            check_dynamic(PROBLEMS[name]())
    else:
        check_dynamic(PROBLEMS[name]())
