"""Checking one rule against the oracle: every test file of this folder lists SAMPLES, and test_registry adds them up.

A sample is a call of the operator at a point where it is smooth, or at a special point that it names. Rules run here
as they are, eagerly, on stacked components; composites run through the whole compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fomoh_fx
from fomoh_fx.hyperdual import Components, HyperDual, primal_of
from fomoh_fx.rules.registry import COMPOSITES, RULES
from tests.oracle import finite_differences, relative_error, reverse_over_reverse, slopes


@dataclass
class Sample:
    """One call ``op(*args, **kwargs)``.

    ``active`` numbers the floating-point tensor leaves that get a tangent (all of them for None); ``truth`` is
    ``"reverse"`` or ``"difference"`` (finite differences, for what reverse mode does not cover). ``outputs`` numbers
    the floating-point outputs that are compared (all for None), and ``hermitian`` says that the directions are.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    active: Sequence[int] | None = None
    truth: str = "reverse"
    tolerance: float = 1e-9
    name: str = ""
    outputs: Sequence[int] | None = None
    hermitian: bool = False


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def check(op: Any, sample: Sample, second_order: str = "plane", directions: int = 3) -> None:
    """Compare primal, tangents and crosses of a few random projections of the output with the oracle."""
    generator = torch.Generator().manual_seed(0)
    leaves, spec = pytree.tree_flatten((sample.args, sample.kwargs))
    floats = [i for i, leaf in enumerate(leaves) if _differentiable(leaf)]
    active = floats if sample.active is None else [floats[i] for i in sample.active]
    xs = [leaves[i] for i in active]

    def stacks(count: int) -> list[Tensor]:
        found = [torch.randn(count, *x.shape, dtype=x.dtype, generator=generator) for x in xs]
        return [v + v.mH for v in found] if sample.hermitian else found

    vs = stacks(directions)

    def call(*values: Any) -> list[Tensor]:
        at = dict(zip(active, values, strict=True))
        args, kwargs = pytree.tree_unflatten([at.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        out = op(*args, **kwargs)
        return chosen([o for o in pytree.tree_leaves(out) if _differentiable(o)])

    def chosen(outputs: list[Any]) -> list[Any]:
        return outputs if sample.outputs is None else [outputs[i] for i in sample.outputs]

    shapes = call(*xs)
    weights = [torch.randn(2, _real(o).numel(), dtype=torch.float64, generator=generator) for o in shapes]

    def projected(*values: Tensor) -> Tensor:
        return sum(w @ _real(o).reshape(-1).double() for w, o in zip(weights, call(*values), strict=True))

    oracle = reverse_over_reverse if sample.truth == "reverse" else finite_differences
    y, tangents, crosses = oracle(projected, xs, vs)
    components = Components(directions, second_order)  # type: ignore[arg-type]
    cross = _combine(crosses, components)
    if op in RULES:
        cs = stacks(components.count)
        cross = cross + slopes(projected, xs, cs, sample.truth)
        results = _by_rule(op, leaves, spec, active, vs, cs, components)
        results = chosen([r for r in results if _differentiable(primal_of(r.primal))])
    else:
        results = _by_transform(call, xs, vs, second_order)
    assert len(results) == len(weights)
    expected = {
        "primal": y,
        "tangent": tangents,
        "cross": cross,
    }
    lead = {"primal": (), "tangent": (directions,), "cross": (components.count,)}
    for part, truth in expected.items():
        actual = torch.zeros_like(truth)
        for weight, result in zip(weights, results, strict=True):
            value = getattr(result, part)
            if value is not None:
                assert value.dtype == result.primal.dtype, f"{part} has dtype {value.dtype}, not {result.primal.dtype}"
                value = value.expand((*lead[part], *result.primal.shape))
                actual = actual + _real(value).reshape(*lead[part], -1).double() @ weight.T
        error = relative_error(actual, truth)
        assert error < (sample.tolerance if sample.truth == "reverse" else 1e-5), (
            f"{op} {sample.name} {part}: {error:.1e}"
        )


def _combine(crosses: Tensor, components: Components) -> Tensor:
    listed = torch.stack([crosses[i, j] for i, j in components.pairs])
    return listed.sum(0, keepdim=True) if components.second_order == "trace" else listed


def _by_rule(
    op: Any,
    leaves: list[Any],
    spec: Any,
    active: Sequence[int],
    vs: Sequence[Tensor],
    cs: Sequence[Tensor],
    components: Components,
) -> list[HyperDual]:
    at = {i: HyperDual(leaves[i], v, c) for i, v, c in zip(active, vs, cs, strict=True)}
    args, kwargs = pytree.tree_unflatten([at.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
    result = RULES[op](op, components, *args, **kwargs)
    found = pytree.tree_leaves(result, is_leaf=lambda x: isinstance(x, HyperDual))
    return [r if isinstance(r, HyperDual) else HyperDual(r) for r in found]


def _by_transform(call: Any, xs: Sequence[Tensor], vs: Sequence[Tensor], second_order: str) -> list[HyperDual]:
    hd = fomoh_fx.transform(call, wrt="inputs", second_order=second_order)  # type: ignore[arg-type]
    out = hd(*xs, tangents=tuple(vs))
    cross = [c if c is None or second_order != "trace" else c.unsqueeze(0) for c in out.cross]
    return [HyperDual(p, t, c) for p, t, c in zip(out.primal, out.tangent, cross, strict=True)]


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def is_served(op: Any) -> bool:
    """Whether the registry serves the operator by a rule or a composite of its own."""
    return op in RULES or op in COMPOSITES
