"""Who takes part in which work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

from benchmarks import bound
from benchmarks.contenders import authors, backprop, jax_peer, jets, mezo, nested, ours
from benchmarks.contenders.base import Run

Contenders = Mapping[str, Callable[..., Run]]

#: All ratios are over this one.
BASE = "fomoh_fx"

PLANE: Contenders = {
    BASE: ours.plane,
    "fomoh_fx, factors": ours.plane_by_factors,
    "fomoh_fx, eager": ours.eager,
    "torch.func, eager": nested.eager,
    "torch.func, compiled": nested.compiled,
    "torch.func, traced, compiled": nested.traced,
    "JAX, K x K": jax_peer.square,
    "JAX, pairs": jax_peer.pairs,
    "fomoh, vectorised": authors.vectorized,
    "fomoh, sequential": authors.sequential,
    "gradient": backprop.gradient,
    "gradient, checkpointed": backprop.checkpointed,
    "gradient and HVP": backprop.gradient_and_product,
    "gradient, JAX": jax_peer.gradient,
    "products alone": bound.products,
    "products alone, folded": bound.folded,
}

STEP: Contenders = {
    BASE: ours.step,
    "fomoh_fx, largest_rise=None": ours.step_unchecked,
    "fomoh_fx, largest_rise=None, rademacher": ours.step_by_signs,
    "fomoh_fx, largest_rise=None, low_rank": ours.step_by_factors,
    "fomoh_fx, plane alone": ours.plane,
    "fomoh, vectorised": authors.step,
    "JAX": jax_peer.step,
    "SGD": backprop.sgd,
    "SGD, checkpointed": backprop.sgd_checkpointed,
    "MeZO": mezo.step,
}

LAPLACIAN: Contenders = {
    BASE: ours.laplacian,
    "jet-for-pytorch": jets.laplacian,
    "torch.func, jvp of jvp": nested.laplacian_forward,
    "torch.func, hessian": nested.laplacian_hessian,
    "JAX": jax_peer.laplacian,
}

MEMORY: Contenders = {
    BASE: ours.plane,
    "fomoh_fx, eager": ours.eager,
    "torch.func, eager": nested.eager,
    "torch.func, traced, compiled": nested.traced,
    "JAX, K x K": jax_peer.square,
    "fomoh, vectorised": authors.vectorized,
    "gradient, eager": backprop.gradient_eager,
    "gradient": backprop.gradient,
    "gradient, checkpointed, eager": backprop.checkpointed_eager,
    "gradient, checkpointed": backprop.checkpointed,
    "MeZO": mezo.step,
}


ATTENTION: Contenders = {
    BASE: ours.plane,
    "fomoh_fx, all rows at once": ours.plane_at_once,
    "gradient": backprop.gradient,
}


def chosen(contenders: Contenders, patterns: Iterable[str]) -> Contenders:
    """Those that match a pattern, and always the base."""
    wanted = list(patterns)
    return {name: make for name, make in contenders.items() if name == BASE or any(fnmatch(name, p) for p in wanted)}


def settings_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What rows of one comparison have in common."""
    return tuple(row[key] for key in ("work", "model", "batch", "directions", "curvature", "rank"))
