"""Guess: the gradient of a loss from perturbed activities, by forward passes only.

For a value s inside the model (a *point*), random perturbations u_k, and the loss of each sample L_n::

    d_kn    = <dL_n / ds_n, u_kn>                      one tangent of the per-sample losses for each k
    delta_n = mean_k d_kn u_kn                         E[delta_n] = dL_n / ds_n for E[u u^T] = I

Every sample has perturbations of its own, so a batch averages as many independent guesses as it has samples (Ren,
Kornblith, Liao, Hinton 2023, Scaling forward gradient with local losses). Perturbations are unit vectors where
samples have few elements: the gradient is then exact. It is at the model's output z, and this makes the others less
noisy: with b_n = B dL_n/dz_n, any matrix B,

    delta_n = b_n + mean_k (d_kn - <b_n, u_kn>) u_kn

has the same mean and a noise of |dL_n/ds_n - b_n| only. What the graph returns is enough to fit B from step to step
(Lansdell, Prakash, Kording 2020, Learning to solve the credit assignment problem). From the point, delta is pulled back
to the parameters by the transposes of single operators (:mod:`fomoh_fx.passes.sites`).

Where a sample has a loss at each of its places (the characters of a text) and places act on each other, delta at place
t is split, d_knt the tangent of the loss at t:

    near_nt = mean_k d_knt u_knt             the place's effect on its own loss
    far_nt  = mean_k sum_t' d_knt' u_knt     on the losses of all other places that it can act on, the later ones only
                                             where the model is causal

Their sum has the mean dL_n/ds_nt. The near part has the noise of one place, the far part that of all of them, so
that they are returned apart. Only the near part is fitted by B.

Contract: a normalised graph in; out comes a graph whose inputs are the primal inputs, then the perturbations of every
random point, then its B, and whose outputs are the loss, one guess for each parameter, the far parts of those that
have one, and for each point with a B the matrices that fit it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.hyperdual import Components, HyperDual, add
from fomoh_fx.passes import provenance
from fomoh_fx.passes.activity import analyse
from fomoh_fx.passes.dataflow import draws
from fomoh_fx.passes.expand import Expander, Scope
from fomoh_fx.passes.normalize import inputs_of
from fomoh_fx.passes.retrace import last_node, recorded_nodes, retrace
from fomoh_fx.passes.sites import Point, is_diagonal, positions
from fomoh_fx.passes.transposes import transpose_of, transposed

aten = torch.ops.aten
Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Grouping:
    """Which elements of a value belong together: those with the same index along ``axes``; ``rows`` of them in all."""

    axes: tuple[int, ...]
    rows: int

    def spread(self, per_row: Tensor, shape: Sequence[int]) -> Tensor:
        """[K, rows] against [K, *shape]."""
        kept = [n if i in self.axes else 1 for i, n in enumerate(shape)]
        return per_row.reshape(per_row.shape[0], *kept)

    def summed(self, x: Tensor) -> Tensor:
        """[K, *shape] -> [K, rows]."""
        others = [i + 1 for i in range(x.ndim - 1) if i not in self.axes]
        return (x.sum(others) if others else x).reshape(x.shape[0], -1)


def groupings(shape: Sequence[int]) -> list[Grouping]:
    """The groupings that are tried, the finest first: leading axes together, then each other axis alone.

    A number is one row for all samples.
    """
    if not shape:
        return [Grouping((), 1)]
    leading = [tuple(range(j)) for j in range(max(len(shape) - 1, 1), 0, -1)]
    tried = [*leading, *[(a,) for a in range(1, len(shape))]]
    return [Grouping(axes, _product(shape[a] for a in axes)) for axes in dict.fromkeys(tried)]


@dataclass(frozen=True)
class Feedback:
    """How a point's values line up with the model's output: ``rows`` times ``inner`` values beside ``outer`` ones."""

    rows: int
    inner: int
    outer: int


@dataclass(frozen=True)
class Places:
    """Rows consist of ``count`` places with a loss each, and act on no earlier place's loss where ``causal``."""

    fine: Grouping
    count: int
    causal: bool

    def elsewhere(self, d: Tensor) -> Tensor:
        """[K, rows of ``fine``]: for every place the sum over all others that it acts on."""
        each = d.reshape(d.shape[0], -1, self.count)
        square = torch.ones(self.count, self.count, dtype=d.dtype, device=d.device)
        others = square.tril(-1) if self.causal else square - torch.eye(self.count, dtype=d.dtype, device=d.device)
        return (each @ others).reshape(d.shape)


@dataclass(frozen=True)
class Perturbed:
    """A point, the samples in it, K perturbations, and the feedback from the output that its guess starts from.

    ``exact``: the perturbations are the K unit vectors of a row's elements.
    """

    point: Point
    grouping: Grouping
    directions: int
    exact: bool
    feedback: Feedback | None = None
    places: Places | None = None

    @property
    def finest(self) -> Grouping:
        """What has a loss of its own."""
        return self.grouping if self.places is None else self.places.fine

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.point.node.meta["val"].shape)


@dataclass(frozen=True)
class Plan:
    """What is guessed.

    Attributes:
        output: the point at the model's output, exact, or None where it has too many elements.
        points: where parameters' gradients are guessed; the output may be one of them.
        losses: the values that the loss sums or averages.
        loss: the loss.
        parameters: the placeholders, in the order in which their guesses are returned.
    """

    output: Perturbed | None
    points: Sequence[Perturbed]
    losses: Sequence[fx.Node]
    loss: fx.Node
    parameters: Sequence[fx.Node]

    @property
    def drawn(self) -> list[Perturbed]:
        """The points with random perturbations."""
        return [p for p in self.points if not p.exact]

    @property
    def fed(self) -> list[Perturbed]:
        """The points with feedback."""
        return [p for p in self.points if p.feedback]

    @property
    def far(self) -> list[fx.Node]:
        """The parameters whose guesses have a far part."""
        reached = {n for p in self.points if p.places for n in p.point.parameters}
        return [n for n in self.parameters if n in reached]


class Tail(Expander):
    """The expansion of what follows a node, on values that are known already."""

    def __init__(
        self, module: fx.GraphModule, values: Values, seed: fx.Node, asked: Collection[fx.Node], directions: int
    ) -> None:
        active = analyse(module.graph, [seed], asked).active
        super().__init__(module, Components(directions, None), Scope(active), label=False)
        self.values, self.seed, self.asked = values, seed, asked

    def tangents(self, stack: Tensor) -> list[Tensor | None]:
        """The tangents of the asked-for nodes when the seed's are ``stack`` [K, *shape]."""
        self.env = dict(self.values)
        self.env[self.seed] = HyperDual(self.values[self.seed], stack)
        for node in self.module.graph.nodes:  # type: ignore[union-attr]
            if node in self.scope.active and node is not self.seed and node.op == "call_function":
                self.env[node] = self.run_node(node)
        found = [self.env[node] for node in self.asked]
        return [v.tangent if isinstance(v, HyperDual) else None for v in found]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        n = self.current
        assert n is not None
        if draws(target):
            return self._drawn_again(n, args)
        result = super().call_function(target, args, kwargs)
        return _with_values(result, self.values[n]) if target is not operator.getitem else result

    def _drawn_again(self, n: fx.Node, args: tuple[Any, ...]) -> Any:
        """A dropout with the mask that the primal has drawn."""
        if n.target is not aten.native_dropout.default or not isinstance(args[0], HyperDual):
            raise UnsupportedOpError(f"operator {n.target}: draws random numbers from a value that is perturbed")
        (y, mask), (x, p, train) = self.values[n], args
        keeps = train is False or p == 0
        factor = None if keeps else mask.to(y.dtype) * (0.0 if p == 1 else 1 / (1 - p))
        return HyperDual(y, x.tangent if keeps else x.tangent * factor), mask


def _with_values(result: Any, known: Any) -> Any:
    """The primals that are known, in place of the same ones computed again."""
    if isinstance(result, (tuple, list)):
        return type(known)(_with_values(r, k) for r, k in zip(result, known, strict=True))
    return HyperDual(known, result.tangent, result.cross) if isinstance(result, HyperDual) else known


def values_of(module: fx.GraphModule, inputs: Sequence[Any], label: bool = True) -> Values:
    """Every node's primal value."""
    primal = Expander(module, Components(1, None), Scope(frozenset()), label=label)
    primal.run(*inputs)
    return dict(primal.env)


def sample_slopes(
    module: fx.GraphModule, values: Values, plan_losses: Sequence[fx.Node], loss: fx.Node, rows: int
) -> Callable[[fx.Node, Tensor], Tensor]:
    """From a node and its perturbations [K, ..] to d [K, rows]: the change of every sample's part of the loss."""
    weights = []
    for node in plan_losses:  # the loss sums c times the values: c is the slope along ones, shared by all
        ones = torch.ones_like(values[node]).unsqueeze(0)
        (slope,) = Tail(module, values, node, [loss], 1).tangents(ones)
        weights.append(slope / values[node].numel())

    def slopes(node: fx.Node, stack: Tensor) -> Tensor:
        tangents = Tail(module, values, node, plan_losses, stack.shape[0]).tangents(stack)
        parts = [
            t.reshape(t.shape[0], rows, -1).sum(-1) * w for t, w in zip(tangents, weights, strict=True) if t is not None
        ]
        total = add(*parts)
        assert total is not None
        return total

    return slopes


def independent(module: fx.GraphModule, values: Values, losses: Sequence[fx.Node], node: fx.Node, g: Grouping) -> bool:
    """Whether no row of a value changes another row's part of the loss: NaNs in every other row stay there."""
    if any(values[n].numel() % g.rows for n in losses):
        return False
    odd = torch.arange(g.rows, device=values[node].device) % 2 == 1
    mark = torch.where(odd, torch.nan, 0.0).to(values[node].dtype).unsqueeze(0)
    stack = g.spread(mark, values[node].shape).expand(1, *values[node].shape)
    tangents = Tail(module, values, node, losses, 1).tangents(stack)
    return all(t is None or bool(t.reshape(g.rows, -1)[~odd].isfinite().all()) for t in tangents)


def places_of(
    module: fx.GraphModule, values: Values, losses: Sequence[fx.Node], node: fx.Node, g: Grouping
) -> Places | None:
    """The places of rows, the next axis of the value, where every place has loss terms of its own."""
    shape, axis = values[node].shape, len(g.axes)
    if g.axes != tuple(range(axis)) or axis + 1 >= len(shape) or shape[axis] == 1:
        return None
    fine = Grouping((*g.axes, axis), g.rows * shape[axis])
    if any(values[n].numel() % fine.rows for n in losses):
        return None
    count = shape[axis]
    size = values[node].numel()
    irregular = torch.arange(1, size + 1, device=values[node].device).double().square().sin().to(values[node].dtype)

    def reaches_back(first: int) -> bool:
        """Whether places from this one on act on the loss of any before it. (NaN times a weight of zero would.)"""
        late = torch.arange(count, device=irregular.device) >= first
        mark = late.to(irregular.dtype).repeat(g.rows).unsqueeze(0)
        stack = fine.spread(mark, shape) * irregular.reshape(1, *shape)
        tangents = Tail(module, values, node, losses, 1).tangents(stack)
        return any(t is not None and bool(t.reshape(g.rows, count, -1)[:, :first].any()) for t in tangents)

    return Places(fine, count, not any(reaches_back(first) for first in sorted({1, count // 2, count - 1})))


def unit_vectors(perturbed: Perturbed, like: Tensor) -> Tensor:
    """[K, *shape]: direction k is one at element k of every row."""
    kept = perturbed.grouping.axes
    inner = [1 if i in kept else n for i, n in enumerate(perturbed.shape)]
    eye = torch.eye(perturbed.directions, dtype=like.dtype, device=like.device)
    return eye.reshape(-1, *inner).expand(-1, *perturbed.shape)


def guess(module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """The graph of the guess."""
    inputs = [n.meta["val"] for n in inputs_of(module)]
    mode = inputs[0].fake_mode
    with mode:
        drawn = [_like(p.point.node, (p.directions, *p.shape)) for p in plan.drawn]
        matrices = [_like(p.point.node, (p.feedback.inner, p.feedback.outer)) for p in plan.fed if p.feedback]

    def guessed(*flat: Any) -> tuple[Tensor, ...]:
        primals, rest = flat[: len(inputs)], flat[len(inputs) :]
        seeds = dict(zip([id(p) for p in plan.drawn], rest, strict=False))
        feedback = dict(zip([id(p) for p in plan.fed], rest[len(seeds) :], strict=True))
        values = values_of(module, primals)
        before = last_node()
        gradients, far, fits = _gradients(module, plan, values, seeds, feedback)
        for node in recorded_nodes(before):
            node.meta.setdefault(provenance.KEY, provenance.Provenance(node.name, "tangent"))
        return (values[plan.loss], *gradients, *far, *fits)

    graph = retrace(guessed, [*inputs, *drawn, *matrices])
    for node in graph.graph.nodes:
        node.meta.setdefault(provenance.KEY, provenance.Provenance(node.name, "primal"))
    return graph


def _gradients(
    module: fx.GraphModule, plan: Plan, values: Values, seeds: Mapping[int, Tensor], feedback: Mapping[int, Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    output = None
    if plan.output is not None:
        stack = unit_vectors(plan.output, values[plan.output.point.node])
        output = _delta(module, plan, plan.output, values, stack).near
    gradients: dict[fx.Node, Tensor] = {}
    far: dict[fx.Node, Tensor] = {}
    fits: list[Tensor] = []
    for p in plan.points:
        value = values[p.point.node]
        if id(p) in seeds:
            seeds = {**seeds, id(p): _carrying(p.point, seeds[id(p)], module, values)}
        stack = unit_vectors(p, value) if p.exact else seeds[id(p)]
        if plan.output is not None and p.point.node is plan.output.point.node:
            assert output is not None
            delta = _Delta(output, output)
        elif p.feedback is None:
            delta = _delta(module, plan, p, values, stack)
        else:
            assert output is not None
            z = output.reshape(p.feedback.rows, p.feedback.outer)
            base = aten.mm(z, feedback[id(p)].t()).reshape(p.shape)
            delta = _delta(module, plan, p, values, stack, base)
            fits += _fit(z, delta.residual.reshape(p.feedback.rows, p.feedback.inner))
        _collect(gradients, pulled_back(p.point, delta.near, module, values))
        if delta.far is not None:
            _collect(far, pulled_back(p.point, delta.far, module, values))
    return [gradients[n] for n in plan.parameters], [far[n] for n in plan.far], fits


def _collect(total: dict[fx.Node, Tensor], parts: Mapping[fx.Node, Tensor]) -> None:
    for parameter, part in parts.items():
        total[parameter] = part if parameter not in total else total[parameter] + part


@dataclass(frozen=True)
class _Delta:
    """The guess of dL/ds, the part of it that the base does not explain, and the part through other places."""

    near: Tensor
    residual: Tensor
    far: Tensor | None = None


def _delta(
    module: fx.GraphModule, plan: Plan, p: Perturbed, values: Values, stack: Tensor, base: Tensor | None = None
) -> _Delta:
    d = sample_slopes(module, values, plan.losses, plan.loss, p.finest.rows)(p.point.node, stack)
    if base is not None:
        d = d - p.finest.summed(stack * base)

    def averaged(slopes: Tensor) -> Tensor:
        total = (p.finest.spread(slopes, p.shape) * stack).sum(0)
        return (total if p.exact else total / p.directions).to(stack.dtype)  # a loss may be wider

    residual = averaged(d)
    far = None if p.places is None else averaged(p.places.elsewhere(d))
    return _Delta(residual if base is None else base + residual, residual, far)


def _carrying(point: Point, stack: Tensor, module: fx.GraphModule, values: Values) -> Tensor:
    """The perturbations without those of elements that no site's value reaches: units that are off."""
    if not any(is_diagonal(user, node) for user, node in point.edges):
        return stack
    reached: Tensor | None = None
    for site in point.sites:
        ones = torch.ones_like(values[site]).unsqueeze(0)
        (slope,) = [ones] if site is point.node else Tail(module, values, site, [point.node], 1).tangents(ones)
        if slope is not None:
            reached = slope != 0 if reached is None else reached | (slope != 0)
    return stack if reached is None else stack * reached.to(stack.dtype)


def _fit(z: Tensor, residual: Tensor) -> list[Tensor]:
    """R^T W Z and Z^T W Z of the regression of the residuals on dL/dz, samples weighted by 1 / |dL_n/dz_n|^2.

    A residual is as noisy as its sample's gradient is large, so the weights make all samples tell as much.
    """
    size = z.square().sum(1, keepdim=True)
    weighted = z / (size + 1e-2 * size.mean() + torch.finfo(z.dtype).tiny)
    return [aten.mm(residual.t(), weighted), aten.mm(z.t(), weighted)]


def pulled_back(point: Point, delta: Tensor, module: fx.GraphModule, values: Values) -> dict[fx.Node, Tensor]:
    """phi^T delta for every parameter of a point."""
    deltas: dict[fx.Node, Any] = {point.node: delta}
    for user in reversed(module.graph.nodes):
        if user not in deltas:
            continue
        for node in dict.fromkeys(n for u, n in point.edges if u is user):
            part = _back(user, node, deltas[user], module, values)
            deltas[node] = part if node not in deltas else deltas[node] + part
    return {n: deltas[n] for n in point.parameters}


def _back(user: fx.Node, node: fx.Node, delta: Tensor, module: fx.GraphModule, values: Values) -> Tensor:
    if user.target is operator.getitem:  # the first of several outputs carries the derivative
        return delta
    if is_diagonal(user, node):
        ones = torch.ones_like(values[node]).unsqueeze(0)
        (slope,) = Tail(module, values, node, [user], 1).tangents(ones)
        assert slope is not None
        return slope.squeeze(0) * delta
    if user.target is aten.native_dropout.default:
        (_, mask), (_, p, _) = values[user], user.args
        assert isinstance(p, (int, float))
        return delta * mask.to(delta.dtype) * (1 / (1 - p))
    args, kwargs = fx.map_arg((user.args, user.kwargs), values.__getitem__)
    total = add(
        *(
            transposed(user.target, i, delta, args, kwargs)
            for i in positions(user, node)
            if transpose_of(user.target, i)
        )
    )
    assert total is not None
    return total


def _like(node: fx.Node, shape: Sequence[int]) -> Tensor:
    value = node.meta["val"]
    return torch.empty(shape, dtype=value.dtype, device=value.device)


def _product(sizes: Any) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
