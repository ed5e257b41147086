"""The work: one model, one batch and K directions, the same for every contender, and its true result."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

from benchmarks.models import Model
from fomoh_fx.low_rank import LowRank, dense

Curvature = Literal["hessian", "ggn"]

#: By name: ``value``, ``slopes`` [K], ``plane`` [K, K], ``first`` (the plane's element 0, 0), ``laplacian``.
Result = Mapping[str, Tensor]

#: The norm of the difference over the norm of the truth.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
#: In float32, of a model that chooses by comparing: one choice in a million that rounding turns was seen to change a
#: plane by 9e-3, in every compiled contender alike.
TURNED = 0.05


@dataclass
class Problem:
    """Value, slopes and plane of ``cross_entropy(module(x), y)`` along ``tangents``, each ``[K, *shape]``."""

    model: Model
    module: nn.Sequential
    x: Tensor
    y: Tensor
    tangents: dict[str, Tensor]
    curvature: Curvature = "hessian"
    factors: dict[str, Tensor | LowRank] = field(default_factory=dict)  # the same directions, if they are of low rank

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module.named_parameters()}

    @property
    def directions(self) -> int:
        return len(next(iter(self.tangents.values())))

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def tolerance(self) -> float:
        """Of the errors of a right result."""
        usual = TOLERANCES[self.dtype]
        return max(usual, TURNED) if self.model.kinked and self.dtype != torch.float64 else usual

    def fresh(self) -> Problem:
        """The same with parameters of its own."""
        return replace(self, module=copy.deepcopy(self.module))


def make(
    model: Model,
    samples: int,
    directions: int,
    curvature: Curvature = "hessian",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rank: int | None = None,
) -> Problem:
    """Directions have unit length, so that all figures have the scale of the model's own curvature.

    With a ``rank`` they are of this rank in all parameters that are matrices or more.
    """
    torch.manual_seed(seed)
    module = model.build().to(device, dtype)
    x, y = model.batch(samples)
    x = x.to(device, dtype) if x.is_floating_point() else x.to(device)
    factors = {name: _random(p.shape, directions, rank) for name, p in module.named_parameters()}
    length = torch.stack([dense(v).flatten(1).square().sum(1) for v in factors.values()]).sum(0).sqrt()
    for name, v in factors.items():
        each = v.left if isinstance(v, LowRank) else v
        each /= length.reshape(-1, *[1] * (each.dim() - 1))
        factors[name] = pytree.tree_map(lambda part: part.to(device, dtype), v)
    tangents = {name: dense(v) for name, v in factors.items()}
    return Problem(model, module, x, y.to(device), tangents, curvature, factors if rank else {})


def _random(shape: torch.Size, directions: int, rank: int | None) -> Tensor | LowRank:
    if rank is None or len(shape) < 2:
        return torch.randn(directions, *shape)
    return LowRank(torch.randn(directions, shape[0], rank), torch.randn(directions, rank, *shape[1:]))


@sdpa_kernel(SDPBackend.MATH)  # the fused ones have no second derivative
def truth(problem: Problem) -> dict[str, Tensor]:
    """By reverse-over-reverse in float64."""
    module = copy.deepcopy(problem.module).double()
    x = problem.x.double() if problem.x.is_floating_point() else problem.x
    parameters = list(module.parameters())
    stacks = [problem.tangents[name].double() for name, _ in module.named_parameters()]
    output = module(x)
    loss = cross_entropy(output, problem.y)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    slopes = sum(torch.einsum("k...,...->k", v, g.detach()) for v, g in zip(stacks, gradient, strict=True))
    if problem.curvature == "hessian":
        rows = []
        for k in range(problem.directions):
            along = sum((g * v[k]).sum() for g, v in zip(gradient, stacks, strict=True))
            product = torch.autograd.grad(along, parameters, retain_graph=True, materialize_grads=True)
            rows.append(sum(torch.einsum("k...,...->k", v, h) for v, h in zip(stacks, product, strict=True)))
        plane = torch.stack(rows)
    else:
        plane = _gauss_newton(output, parameters, stacks, problem.y)
    return {"value": loss.detach(), "slopes": slopes, "plane": plane, "first": plane[0, 0]}


def _gauss_newton(output: Tensor, parameters: list[Tensor], stacks: list[Tensor], y: Tensor) -> Tensor:
    """z_i^T (d^2 loss / dz^2) z_j, with z_i = J v_i by differentiating J^T u, which is linear in u."""
    u = torch.zeros_like(output, requires_grad=True)
    pulled = torch.autograd.grad(output, parameters, u, create_graph=True)
    columns = []
    for k in range(len(stacks[0])):
        along = sum((g * v[k]).sum() for g, v in zip(pulled, stacks, strict=True))
        columns.append(torch.autograd.grad(along, u, retain_graph=True)[0])
    z = output.detach().requires_grad_()
    slope = torch.autograd.grad(cross_entropy(z, y), z, create_graph=True)[0]
    products = [torch.autograd.grad((slope * c).sum(), z, retain_graph=True)[0] for c in columns]
    return torch.stack([torch.stack([(c * h).sum() for c in columns]) for h in products])


def errors(result: Result, expected: Result) -> dict[str, float]:
    """Norm-wise, for each quantity that the contender has."""
    return {
        name: float((value.double().cpu() - expected[name].cpu()).norm() / expected[name].cpu().norm())
        for name, value in result.items()
    }
