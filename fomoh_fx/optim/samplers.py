"""Samplers: K random directions over all parameters together, scaled so that E[v v^T] is the identity.

A directional derivative times its direction is then, on average, the gradient; where that is zero the noise of a step
remains (:class:`~fomoh_fx.optim.ForwardOptimizer`). A sampler is a function of the
parameters by name, K, and :class:`~fomoh_fx.optim.streams.Streams` (called with a device, they give its generator);
``functools.partial`` sets its options: ``sampler=partial(low_rank, rank=4)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from fomoh_fx.errors import ArgumentError
from fomoh_fx.low_rank import LowRank
from fomoh_fx.optim.streams import Streams

Stacks = dict[str, Tensor]
Proposed = Mapping[str, Tensor | LowRank]
Sampler = Callable[[Mapping[str, Tensor], int, Streams], Proposed]


def normal(parameters: Mapping[str, Tensor], count: int, streams: Streams) -> Stacks:
    """v ~ N(0, I)."""
    return _drawn(parameters, count, streams.normals)


def rademacher(parameters: Mapping[str, Tensor], count: int, streams: Streams) -> Stacks:
    """Every element +1 or -1: of all independent elements, the ones whose estimates vary least, and the fastest."""
    return _drawn(parameters, count, streams.signs)


def sphere(parameters: Mapping[str, Tensor], count: int, streams: Streams) -> Stacks:
    """Uniform on the sphere of radius sqrt(n), n the number of real parameters."""
    drawn = normal(parameters, count, streams)
    return scaled(drawn, unit_scale(drawn))


def orthogonal(parameters: Mapping[str, Tensor], count: int, streams: Streams) -> Stacks:
    """Each one uniform on the sphere of radius sqrt(n), and all of them mutually orthogonal."""
    dimension = dimension_of(parameters)
    _fits(count, dimension)
    drawn = normal(parameters, count, streams)
    rows = [_rows(v) for v in drawn.values()]
    flat = torch.cat([row.to(rows[0].device) for row in rows], 1)
    q, r = torch.linalg.qr(flat.to(torch.promote_types(flat.dtype, torch.float32)).mT)
    signs = torch.where(r.diagonal() < 0, -1, 1)  # those that LAPACK chooses are not uniform (Mezzadri 2007)
    parts = ((q * signs).mT * math.sqrt(dimension)).split([row.shape[1] for row in rows], 1)
    return {name: _like(part, v) for part, (name, v) in zip(parts, drawn.items(), strict=True)}


def coordinate(parameters: Mapping[str, Tensor], count: int, streams: Streams) -> Stacks:
    """Different unit vectors, times sqrt(n): drawn without replacement, or all n of them in order."""
    dimension = dimension_of(parameters)
    _fits(count, dimension)
    first = next(iter(parameters.values()))
    every = torch.arange(dimension, device=first.device)
    if count < dimension:
        drawn = torch.rand(dimension, device=first.device, generator=streams(first.device))
        every = drawn.topk(count).indices
    scale, stacks, start = math.sqrt(dimension), {}, 0
    for name, p in parameters.items():
        like = p.detach().expand(count, *p.shape)
        size = _rows(like).shape[1]
        own = torch.arange(start, start + size, device=p.device)
        rows = (every.to(p.device).unsqueeze(1) == own) * scale
        stacks[name], start = _like(rows, like), start + size
    return stacks


def low_rank(parameters: Mapping[str, Tensor], count: int, streams: Streams, rank: int = 1) -> Proposed:
    """sum_r u_r w_r^T / sqrt(rank), u, w ~ N(0, I), for a parameter of two axes or more: the first against all others.

    They stay factors (:class:`~fomoh_fx.LowRank`), so that few numbers are drawn and a layer's products with its
    directions cost little. Other parameters get ``normal`` directions.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ArgumentError(f"rank: expected a number of at least 1, got {rank!r}")
    drawn: dict[str, Tensor | LowRank] = {}
    for name, p in parameters.items():
        columns = normal({name: p.new_empty(p.shape[:1] + (rank,) if p.dim() > 1 else p.shape)}, count, streams)[name]
        drawn[name] = columns
        if p.dim() > 1:
            real = p.real if p.is_complex() else p
            rows = streams.normals((count, rank, *p.shape[1:]), real)
            drawn[name] = LowRank(columns / math.sqrt(rank), rows.to(p.dtype))
    return drawn


SAMPLERS: dict[str, Sampler] = {
    "normal": normal,
    "rademacher": rademacher,
    "sphere": sphere,
    "orthogonal": orthogonal,
    "coordinate": coordinate,
    "low_rank": low_rank,
}


def dimension_of(parameters: Mapping[str, Tensor]) -> int:
    """n, the number of real parameters: a complex one counts twice."""
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in parameters.values())


def unit_scale(stacks: Mapping[str, Tensor]) -> Tensor:
    """sqrt(n) / ||v_i|| of each direction: [K]; 0 where the direction is zero."""
    norm = norms(stacks)
    one = {name: v[0] for name, v in stacks.items()}
    return torch.where(norm > 0, math.sqrt(dimension_of(one)) / norm, 0)


def scaled(stacks: Mapping[str, Tensor], scale: Tensor) -> Stacks:
    """Each direction times its own factor: scale is [K]."""
    return {name: v * scale.to(v).reshape(-1, *[1] * (v.dim() - 1)) for name, v in stacks.items()}


def norms(stacks: Mapping[str, Tensor]) -> Tensor:
    """||v_i|| of each direction over all parameters: [K], in at least float32."""
    parts = [_rows(v) for v in stacks.values()]
    wide = reduce(torch.promote_types, (p.dtype for p in parts), torch.float32)
    first = parts[0].device
    each = torch.stack([torch.linalg.vector_norm(p, dim=1, dtype=wide).to(first) for p in parts])
    return torch.linalg.vector_norm(each, dim=0)


def _drawn(parameters: Mapping[str, Tensor], count: int, draw: Callable[[Sequence[int], Tensor], Tensor]) -> Stacks:
    """A stack for each parameter; a complex one has independent real and imaginary parts."""
    drawn = {}
    for name, p in parameters.items():
        real = torch.view_as_real(p.detach()) if p.is_complex() else p
        v = draw((count, *real.shape), real)
        drawn[name] = torch.view_as_complex(v) if p.is_complex() else v
    return drawn


def _fits(count: int, dimension: int) -> None:
    if count > dimension:
        raise ArgumentError(f"directions: {count} independent directions do not fit into {dimension} parameters")


def _rows(v: Tensor) -> Tensor:
    """[K, *shape] as the real matrix [K, n]."""
    return (torch.view_as_real(v) if v.is_complex() else v).reshape(v.shape[0], -1)


def _like(rows: Tensor, v: Tensor) -> Tensor:
    """The inverse of :func:`_rows`, in the dtype, shape and place of ``v``."""
    if v.is_complex():
        return torch.view_as_complex(rows.reshape(*v.shape, 2).contiguous()).to(v)
    return rows.reshape(v.shape).contiguous().to(v)
