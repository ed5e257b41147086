"""Checking a whole model: value, tangents, crosses and updated buffers against the oracle, eagerly and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fomoh_fx
from fomoh_fx.hyperdual import Components
from fomoh_fx.passes.activity import analyse
from fomoh_fx.specialization import Specialization
from fomoh_fx.transform import HyperDualModule
from tests.oracle import finite_differences, relative_error, reverse_over_reverse


def projection(output: Any, *targets: Any) -> Tensor:
    """A scalar of every floating-point leaf that no derivative vanishes in: sum of y sin(i) + y^2 / 2, averaged."""
    del targets
    total = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            y = (torch.view_as_real(leaf) if leaf.is_complex() else leaf).reshape(-1)
            weights = torch.sin(torch.arange(1, y.numel() + 1, dtype=y.dtype, device=y.device))
            total.append((y * weights + y.square() / 2).mean())
    return torch.stack(total).sum()


@dataclass
class Problem:
    """A model in float64 with the arguments of one call.

    ``wrt`` is what carries tangents; ``active`` numbers the positional arguments for ``wrt="inputs"``. ``tolerance``
    is norm-wise; ``truth`` is ``"reverse"`` or ``"difference"``, by differences of ``step``.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    loss: Callable[..., Tensor] = projection
    targets: tuple[Any, ...] = ()
    wrt: str = "parameters"
    active: Sequence[int] = (0,)
    truth: str = "reverse"
    tolerance: float = 1e-8
    step: float = 1e-4

    def directions(self, count: int) -> Any:
        """Random tangents for everything that ``wrt`` selects."""
        generator = torch.Generator().manual_seed(1)

        def stack(x: Tensor) -> Tensor:
            return torch.randn(count, *x.shape, dtype=x.dtype, generator=generator).to(x.device)

        if self.wrt == "inputs":
            return tuple(stack(a) if i in self.active else None for i, a in enumerate(self.args))
        return {name: stack(p) for name, p in self.model.named_parameters()}

    def to(self, device: str) -> Problem:
        """The same problem there."""
        moved = pytree.tree_map_only(Tensor, lambda x: x.to(device), (self.args, self.kwargs, self.targets))
        args, kwargs, targets = moved
        return replace(self, model=self.model.to(device), args=args, kwargs=kwargs, targets=targets)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def truth_of(problem: Problem, tangents: Any) -> tuple[Tensor, Tensor, Tensor, nn.Module]:
    """Value, tangents [K], crosses [K, K], and the model whose buffers one evaluation has updated."""
    model = deepcopy(problem.model)
    if problem.wrt == "inputs":
        keys: list[Any] = list(problem.active)
        points = [problem.args[i] for i in keys]
        stacks = [tangents[i] for i in keys]
    else:
        keys = list(tangents)
        named = dict(model.named_parameters(remove_duplicate=False))
        points, stacks = [named[name] for name in keys], [tangents[name] for name in keys]
    is_complex = [p.is_complex() for p in points]

    def function(*values: Tensor) -> Tensor:
        torch.manual_seed(0)
        shaped = [torch.view_as_complex(v) if c else v for v, c in zip(values, is_complex, strict=True)]
        at = dict(zip(keys, shaped, strict=True))
        if problem.wrt == "inputs":
            output = model(*(at.get(i, a) for i, a in enumerate(problem.args)), **problem.kwargs)
        else:
            output = torch.func.functional_call(model, at, problem.args, problem.kwargs)
        return problem.loss(output, *problem.targets)

    oracle = reverse_over_reverse if problem.truth == "reverse" else partial(finite_differences, step=problem.step)
    points = [_real(p.detach()) for p in points]
    return (*oracle(function, points, [_real(s) for s in stacks]), model)


def computes_in_float32(specialization: Specialization) -> bool:
    """Whether the model itself, all of it in float64, computes something with a derivative in float32."""
    graph = specialization.stages["normalize"].graph
    seeds = [n for n in graph.find_nodes(op="placeholder") if n.meta["val"].is_floating_point()]
    active = analyse(graph, seeds, graph.output_node().all_input_nodes).active
    return any(n.meta["val"].dtype == torch.float32 for n in active if isinstance(n.meta.get("val"), Tensor))


def check(
    problem: Problem,
    second_order: str | None = "plane",
    directions: int = 2,
    lower: Callable[[Any], Any] = lambda hd: hd,
    true: Problem | None = None,
) -> fomoh_fx.HyperDual:
    """Compare with the oracle, at the same problem elsewhere if given; ``lower`` may compile the transformed model."""
    hd = fomoh_fx.transform(problem.model, problem.loss, wrt=problem.wrt, second_order=second_order)  # type: ignore[arg-type]
    return check_call(lower(hd), problem, directions, true)


def check_call(
    hd: HyperDualModule, problem: Problem, directions: int = 2, true: Problem | None = None
) -> fomoh_fx.HyperDual:
    """Compare one call of a transformed model with the oracle."""
    tangents, true = problem.directions(directions), true or problem
    value, slopes, crosses, updated = truth_of(true, true.directions(directions))
    torch.manual_seed(0)
    out = hd(*problem.args, tangents=tangents, targets=problem.targets, **problem.kwargs)
    within = max(problem.tolerance, 1e-5 if computes_in_float32(hd.latest) else 0)
    expected = {"primal": value, "tangent": slopes}
    if hd.second_order is not None:
        listed = torch.stack([crosses[i, j] for i, j in Components(directions, hd.second_order).pairs])
        expected["cross"] = listed.sum(0) if hd.second_order == "trace" else listed
    for part, truth in expected.items():
        actual = getattr(out, part)
        assert actual.shape == truth.shape and actual.dtype == truth.dtype, part
        error = float((actual.cpu() - truth.cpu()).norm() / truth.norm())
        assert error < within, f"{part}: {error:.1e}, not within {within}"
    if problem.truth == "reverse":  # finite differences evaluate several times
        buffers = dict(updated.named_buffers())
        for name, buffer in problem.model.named_buffers():
            assert relative_error(buffer.double(), buffers[name].double()) < 1e-12, f"buffer {name}"
    return out
