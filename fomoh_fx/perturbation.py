"""Guesses of the gradient of a model's loss from perturbed activities, compiled once for each signature."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fomoh_fx.cache import Cache
from fomoh_fx.capture import Call, Program, capture
from fomoh_fx.capture.overlaps import refuse_overlaps
from fomoh_fx.capture.reading import Reading
from fomoh_fx.capture.threads import CAPTURING
from fomoh_fx.errors import ArgumentError
from fomoh_fx.passes import provenance
from fomoh_fx.passes.activity import analyse, ancestors
from fomoh_fx.passes.cse import merge_common_subexpressions
from fomoh_fx.passes.eliminate import eliminate
from fomoh_fx.passes.factors import apart
from fomoh_fx.passes.guess import (
    Feedback,
    Grouping,
    Perturbed,
    Plan,
    Values,
    groupings,
    guess,
    independent,
    places_of,
    values_of,
)
from fomoh_fx.passes.layouts import settle
from fomoh_fx.passes.normalize import inputs_of, normalize, results_of
from fomoh_fx.passes.parts import take_apart
from fomoh_fx.passes.retrace import without_autocast
from fomoh_fx.passes.simplify import simplify
from fomoh_fx.passes.sites import Point, find_points, lost_ways, reductions
from fomoh_fx.passes.verify import verify
from fomoh_fx.seeds import Seeds
from fomoh_fx.signature import signature_of
from fomoh_fx.specialization import is_as_captured, outside_of
from fomoh_fx.transform import HyperDualModule, argument_names

#: At most so many numbers in a matrix that feeds the output's gradient back to a point.
LARGEST_FEEDBACK = 1 << 23
#: At most so many values of one sample's output; more are not perturbed one by one.
WIDEST_OUTPUT = 512


@dataclass(frozen=True)
class Fit:
    """What a step tells about a feedback matrix B: the regression of residuals on the output's gradient.

    ``noise`` is the variance of a residual's element relative to the squared error of its sample's guess, which is
    spread over all elements that were perturbed together.
    """

    cross: Tensor
    gram: Tensor
    noise: float


@dataclass(frozen=True)
class Guess:
    """The loss, the guessed gradient of every parameter by its name, and what fits each feedback matrix.

    ``far`` are the parts of gradients that go through other places of a sample, noisier ones; the whole gradient is the
    sum of ``gradients`` and these.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    fits: dict[str, Fit]
    far: dict[str, Tensor] = field(default_factory=dict)

    @property
    def whole(self) -> dict[str, Tensor]:
        """The gradients with their far parts: without bias."""
        return {name: g + self.far[name] if name in self.far else g for name, g in self.gradients.items()}


for kind in (Fit, Guess):
    pytree.register_dataclass(kind)


@dataclass
class _Specialization:
    program: Program
    plan: Plan
    names: list[str]
    far: list[str]
    graph: fx.GraphModule
    run: Callable[..., Any]
    outside: Reading


class ActivityGradient:
    """The gradient of a transformed model's loss, guessed with forward passes only (:mod:`fomoh_fx.passes.guess`).

    Args:
        hd: a transformed model with a loss.
        perturbations: K, how many random perturbations of every sample and point are averaged.
        exact: values with at most so many elements for each sample are perturbed by all their unit vectors, which
            gives the exact gradient. The model's output always is, up to :data:`WIDEST_OUTPUT` elements.
        feedback: whether guesses start from what the exact gradient at the output predicts.
    """

    def __init__(self, hd: HyperDualModule, perturbations: int = 4, exact: int = 32, feedback: bool = True) -> None:
        if hd.loss is None:
            raise ArgumentError("hd: guessing from activities needs the loss apart: transform(model, loss)")
        if isinstance(perturbations, bool) or not isinstance(perturbations, int) or perturbations < 1:
            raise ArgumentError(f"perturbations: expected a number of at least 1, got {perturbations!r}")
        self.hd, self.perturbations, self.exact, self.feedback = hd, perturbations, exact, feedback
        self._specializations: Cache[_Specialization] = Cache()
        self._latest: _Specialization | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy specialises itself anew, as a copy of ``hd`` does."""
        return {**self.__dict__, "_specializations": Cache(), "_latest": None}

    def __call__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        targets: Sequence[Any],
        parameters: Sequence[str],
        draw: Callable[[Sequence[int], Tensor], Tensor],
        feedback: Mapping[str, Tensor],
    ) -> Guess:
        """One guess.

        Args:
            args, kwargs, targets: the batch.
            parameters: the names of those to guess for.
            draw: ``draw(shape, like)`` returns independent elements of mean zero and variance one.
            feedback: the matrices by the names of their points; a missing one is zero.
        """
        call = Call(args, kwargs, tuple(targets))
        found = self._specialized(call, tuple(parameters))
        inputs = [what.value(call.tensors) for what in found.program.inputs]
        refuse_overlaps(found.program, inputs)
        values = {n: n.meta["val"] for n in (p.point.node for p in found.plan.points)}
        like = {n: torch.empty((), dtype=v.dtype, device=v.device) for n, v in values.items()}
        drawn = [draw((p.directions, *p.shape), like[p.point.node]) for p in found.plan.drawn]
        matrices = []
        for p in found.plan.fed:
            assert p.feedback is not None
            zero = like[p.point.node].new_zeros(p.feedback.inner, p.feedback.outer)
            matrices.append(feedback.get(p.point.node.name, zero).to(zero))
        with torch.no_grad(), without_autocast():
            loss, *rest = found.run(*inputs, *drawn, *matrices)
        gradients = dict(zip(found.names, rest, strict=False))
        far = dict(zip(found.far, rest[len(gradients) :], strict=False))
        pairs = rest[len(gradients) + len(far) :]
        fits = {p.point.node.name: Fit(pairs[2 * i], pairs[2 * i + 1], _noise(p)) for i, p in enumerate(found.plan.fed)}
        return Guess(loss, gradients, fits, far)

    @property
    def latest(self) -> fx.GraphModule:
        """The graph of the latest call."""
        assert self._latest is not None
        return self._latest.graph

    @property
    def plan(self) -> Plan:
        """What the graph of the latest call guesses, and how."""
        assert self._latest is not None
        return self._latest.plan

    def _specialized(self, call: Call, parameters: tuple[str, ...]) -> _Specialization:
        signature = signature_of(self.hd.model, self.hd.loss, call, Seeds((), (), 0))
        key = signature, parameters
        found = self._specializations.find(key, lambda s: is_as_captured(s.program, s.outside, call.tensors))
        if found is None:
            with CAPTURING:  # one thread at a time
                found = self._compile(call, parameters)
                self._specializations.add(key, found, self.hd.most_specializations)
        self._latest = found
        return found

    def _compile(self, call: Call, parameters: tuple[str, ...]) -> _Specialization:
        program = capture(self.hd.model, self.hd.loss, call, argument_names(self.hd.model, call))
        at = [i for i, out in enumerate(program.outputs) if out.changes is None]
        trained = [i for i, what in enumerate(program.inputs) if what.kind == "parameter" and what.name in parameters]
        loss, placeholders = program.results[at[0]], program.placeholders
        active = analyse(program.module.graph, [placeholders[i] for i in trained], [loss]).active
        module = take_apart(eliminate(normalize(program.module, active)))
        verify(module, "normalize")
        with torch.no_grad(), without_autocast(), torch.random.fork_rng():
            values = values_of(module, [what.value(call.tensors) for what in program.inputs], label=False)
            plan = self._plan(module, program, values, trained, at)
        graph = guess(module, plan)
        for rewrite in (eliminate, simplify, merge_common_subexpressions, apart, settle, eliminate):
            graph = rewrite(graph)
            verify(graph, "guess")
        positions = {n: i for i, n in enumerate(inputs_of(module))}
        names, far = ([program.inputs[positions[n]].name for n in nodes] for nodes in (plan.parameters, plan.far))
        run = self.hd.lowering(graph, False)
        return _Specialization(program, plan, names, far, graph, run, outside_of(program))

    def _plan(
        self, module: fx.GraphModule, program: Program, values: Values, trained: Sequence[int], at: Sequence[int]
    ) -> Plan:
        inputs, results = inputs_of(module), results_of(module)
        parameters = [inputs[i] for i in trained]
        data = [n for n, what in zip(inputs, program.inputs, strict=True) if what.kind == "argument"]
        loss = results[at[0]]
        losses = reductions(module.graph, parameters, loss)
        if not losses:
            raise ArgumentError(
                "loss: its last step must be a sum or a mean over samples, so that every sample has a loss of its own"
            )
        if any(values[n].numel() == 0 for n in losses):  # no sample tells anything
            return Plan(None, [], losses, loss, [])
        before = ancestors(module.graph, losses)  # a penalty beside them is no sample's
        points = [p for p in find_points(module.graph, parameters, data, loss) if p.node in before]
        reached = list(dict.fromkeys(n for p in points for n in p.parameters))
        names = {n: what.name for n, what in zip(inputs, program.inputs, strict=True)}
        if missing := [names[n] for n in parameters if n not in reached]:
            _warn_of_missing(missing, bool(reached))
        lost = lost_ways(module.graph, parameters, data, loss)
        if partly := {names[n]: node for n, node in lost.items() if n in reached}:
            _warn_of_lost(partly)
        output = self._output(module, values, losses, [results[i] for i in at[1:]], points)
        perturbed = [self._perturbed(module, values, losses, p, output) for p in points]
        return Plan(output, perturbed, losses, loss, [n for n in parameters if n in reached])

    def _output(
        self, module: fx.GraphModule, values: Values, losses: Sequence[fx.Node], outputs: Sequence[fx.Node],
        points: Sequence[Point],
    ) -> Perturbed | None:  # fmt: skip
        if len(outputs) != 1 or not values[outputs[0]].is_floating_point() or values[outputs[0]].ndim == 0:
            return None
        (node,) = outputs
        grouping = _grouping(module, values, losses, node)
        if grouping is None:
            return None
        width = values[node].numel() // grouping.rows
        point = next((p for p in points if p.node is node), Point(node))
        return Perturbed(point, grouping, width, True) if width <= WIDEST_OUTPUT else None

    def _perturbed(
        self, module: fx.GraphModule, values: Values, losses: Sequence[fx.Node], point: Point, output: Perturbed | None
    ) -> Perturbed:
        if output is not None and point.node is output.point.node:
            return output
        placed = ((p, _grouping(module, values, losses, p.node)) for p in (point, *point.in_other_layouts()))
        point, grouping = next(((p, g) for p, g in placed if g is not None), (point, None))
        interacting = grouping is None
        if grouping is None:
            grouping = _coarsest(values, losses, point.node)
            _warn_of_interaction(point.node)
        width = values[point.node].numel() // grouping.rows
        if width <= self.exact and not interacting:
            return Perturbed(point, grouping, width, True)
        feedback = _feedback(values[point.node].shape, values[output.point.node].shape) if output else None
        if not self.feedback or feedback is None or feedback.inner * feedback.outer > LARGEST_FEEDBACK:
            feedback = None
        places = None if interacting else places_of(module, values, losses, point.node, grouping)
        return Perturbed(point, grouping, self.perturbations, False, feedback, places)


def _grouping(module: fx.GraphModule, values: Values, losses: Sequence[fx.Node], node: fx.Node) -> Grouping | None:
    for g in groupings(values[node].shape):
        if independent(module, values, losses, node, g):
            return g
    return None


def _coarsest(values: Values, losses: Sequence[fx.Node], node: fx.Node) -> Grouping:
    """Samples along the first axis, although they interact."""
    g = Grouping((0,), values[node].shape[0])
    if any(values[n].numel() % g.rows for n in losses):
        raise ArgumentError(
            f"model: the samples of a batch cannot be told apart at {provenance.of(node).source or node.name}: the "
            f"loss has {values[losses[0]].numel()} terms, and this value has shape {list(values[node].shape)}"
        )
    return g


def _feedback(shape: Sequence[int], output: Sequence[int]) -> Feedback | None:
    """Matrices' rows are the leading axes that a point has in common with the output."""
    common, rows = 0, 1
    for a, b in zip(shape, output[:-1], strict=False):
        if a != b:
            break
        common, rows = common + 1, rows * a
    if not common:
        return None
    return Feedback(rows, _numel(shape[common:]), _numel(output[common:]))


def _noise(p: Perturbed) -> float:
    return _numel(p.shape) / (p.finest.rows * p.directions)


def _numel(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _warn_of_missing(missing: Sequence[str], is_any_reached: bool) -> None:
    names = ", ".join(missing)
    if not is_any_reached:
        raise ArgumentError(
            f"model: none of the parameters ({names}) acts on values of separate samples through an operator whose "
            "transpose is known (linear, convolution, embedding, products and sums); use another sampler"
        )
    warnings.warn(
        f"no gradient is guessed for {names}, which act through operators whose transposes are not known, or not at "
        "all on this loss",
        stacklevel=10,
    )


def _warn_of_lost(partly: Mapping[str, fx.Node]) -> None:
    places = ", ".join(f"{name} ({provenance.of(node).source or node.name})" for name, node in partly.items())
    warnings.warn(
        f"the guessed gradient leaves out how parameters act elsewhere, through operators whose transposes are not "
        f"known: {places}",
        stacklevel=10,
    )


def _warn_of_interaction(node: fx.Node) -> None:
    warnings.warn(
        f"samples of a batch act on each other's losses (batch normalisation in training mode does that) behind "
        f"{provenance.of(node).source or node.name}: the guess leaves this out, so it is only approximate",
        stacklevel=12,
    )
