"""fomoh_fx."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fomoh_fx
from benchmarks.contenders.base import Absent, Local, Options, plane_of
from benchmarks.problem import Problem
from fomoh_fx.optim import FoMoHKD
from fomoh_fx.rules import attention


def hyperdual(problem: Problem, options: Options, compiled: bool = True) -> fomoh_fx.HyperDualModule:
    hd = fomoh_fx.transform(problem.module, cross_entropy, curvature=problem.curvature)
    return fomoh_fx.compile(hd, **({} if options.mode is None else {"mode": options.mode})) if compiled else hd


def plane(problem: Problem, options: Options, compiled: bool = True) -> Local:
    return _plane(problem, options, problem.tangents, compiled)


def plane_by_factors(problem: Problem, options: Options, compiled: bool = True) -> Local:
    """With directions of low rank as they are."""
    if not problem.factors:
        raise Absent("the directions are not of low rank: --rank")
    return _plane(problem, options, problem.factors, compiled)


def plane_at_once(problem: Problem, options: Options) -> Local:
    """With all scores of attention at once."""
    with patch.object(attention, "MOST_SCORES", math.inf):
        run = plane(problem, options)
        run.result()  # traced and compiled here
    return run


def _plane(problem: Problem, options: Options, tangents: Mapping[str, Any], compiled: bool) -> Local:
    hd = hyperdual(problem, options, compiled)

    def evaluate() -> tuple[Tensor, Tensor, Tensor]:
        out = hd(problem.x, tangents=tangents, targets=(problem.y,))
        return out.primal, out.tangent, out.hessian()

    return Local(evaluate, problem.device, plane_of)


def eager(problem: Problem, options: Options) -> Local:
    return plane(problem, options, compiled=False)


def step(problem: Problem, options: Options, **settings: Any) -> Local:
    """Directions are drawn, evaluated, solved for; the parameters move and, by default, the loss is looked at again."""
    hd = hyperdual(problem, options)
    optimizer = FoMoHKD(hd, lr=1e-3, directions=problem.directions, seed=0, **settings)
    return Local(lambda: optimizer.step(problem.x, targets=(problem.y,)), problem.device, lambda loss: {"value": loss})


def step_unchecked(problem: Problem, options: Options) -> Local:
    return step(problem, options, largest_rise=None)


def step_by_signs(problem: Problem, options: Options) -> Local:
    """With the directions that are drawn fastest."""
    return step(problem, options, largest_rise=None, sampler="rademacher")


def step_by_factors(problem: Problem, options: Options) -> Local:
    """With directions of rank one."""
    return step(problem, options, largest_rise=None, sampler="low_rank")


def laplacian(model: nn.Module, x: Tensor, options: Options) -> Local:
    """One component for the sum over all unit directions of each sample."""
    hd = fomoh_fx.compile(fomoh_fx.transform(model, wrt="inputs", second_order="trace", first_order=False))
    size = x.shape[-1]
    units = torch.eye(size, dtype=x.dtype, device=x.device)[:, None].expand(size, *x.shape)
    return Local(lambda: hd(x, tangents=(units,)).cross, x.device, lambda value: {"laplacian": value})
