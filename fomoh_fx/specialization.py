"""One specialisation: a captured and compiled graph for one signature, and how its inputs and outputs are wired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fomoh_fx.capture import Program
from fomoh_fx.capture.assignment import COMPUTED_FROM
from fomoh_fx.capture.call import Arguments
from fomoh_fx.capture.draws import same_graph
from fomoh_fx.capture.layouts import has_its_layouts
from fomoh_fx.capture.nested import Part, is_a_part
from fomoh_fx.capture.overlaps import refuse_overlaps
from fomoh_fx.capture.reading import Reader, Reading, kind_of, unusual_strides_of
from fomoh_fx.dynamic_shapes import has_range_of
from fomoh_fx.errors import CaptureError, FomohError
from fomoh_fx.failures import explain
from fomoh_fx.guards import Guards
from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.low_rank import factors
from fomoh_fx.lower import Lowering
from fomoh_fx.passes.eliminate import eliminate
from fomoh_fx.passes.normalize import results_of
from fomoh_fx.passes.pipeline import Compiled, copy_of
from fomoh_fx.passes.retrace import without_autocast
from fomoh_fx.seeds import Seeds, axes_alike, once
from fomoh_fx.signature import Signature, argument_kind_of, modes, modules_of


@dataclass
class Specialization:
    """The expansion for one signature.

    Attributes:
        program: what was captured.
        compiled: every stage of the graph.
        components: which components it propagates.
        with_loss: whether the first result is the loss and the second the model's output.
        first_order: whether the result has tangents.
        seeds: what the tangents belong to.
        signature: of the call that was traced.
        dims: the dynamic dimensions of each argument, or None where everything is static.
        traced_with: shape, dtype, device and layout of each argument and tangent, for every call that it served.
        others: the arguments that are not tensors.
        modes: autocast and the like.
        outside: the modules that a function refers to without owning them, as they were.
        parts: of the model, the loss and those modules, what Dynamo can compare.
        settings: those of all modules that Dynamo can compare.
        lowering: from a graph, and whether it has dynamic dimensions, to what is called.
        run: the final graph, lowered.
    """

    program: Program
    compiled: Compiled
    components: Components
    with_loss: bool
    first_order: bool
    seeds: Seeds
    signature: Signature
    dims: list[dict[int, Any]] | None
    traced_with: list[list[list[tuple[Any, ...]]]]
    others: list[Any]
    modes: list[Any]
    outside: Reading
    parts: list[tuple[nn.Module, list[Any]]]
    settings: list[tuple[nn.Module, str, Any]]
    lowering: Lowering
    run: Callable[..., Any]

    @cached_property
    def value(self) -> Callable[..., Any]:
        """The captured graph with its first value alone, lowered; it draws what the model draws."""
        module = copy_of(self.program.module)
        (output,) = module.graph.find_nodes(op="output")
        first = next(i for i, out in enumerate(self.program.outputs) if out.changes is None)
        output.args = (results_of(module)[first],)
        return self.lowering(eliminate(module), self.dims is not None)

    @property
    def stages(self) -> dict[str, fx.GraphModule]:
        return self.compiled.stages

    def compiles(self, program: Program, signature: Signature) -> bool:
        """Whether what was compiled here is the expansion of another capture too, for its own signature.

        A model may have changed an attribute on which its graph does not depend. Not where dimensions are dynamic.
        """
        mine = self.signature
        if self.dims is not None or (mine.shapes, mine.request) != (signature.shapes, signature.request):
            return False
        if mine.call[:2] != signature.call[:2]:  # structure and kinds of the arguments
            return False
        ours, theirs = (([o.kind for o in p.outputs], _inputs_like(p), [*p.layouts]) for p in (self.program, program))
        return ours == theirs and same_graph(self.program, program)

    def covers(self, dims: list[dict[int, Any]] | None) -> bool:
        """Whether every dimension that a caller wants dynamic is dynamic here, in its whole range."""
        if dims is None:
            return True
        pairs = [] if self.dims is None else [*zip(dims, self.dims, strict=True)]
        return self.dims is not None and all(
            d in mine and has_range_of(mine[d], kind) for wanted, mine in pairs for d, kind in wanted.items()
        )

    def serves(self, signature: Signature, tensors: Sequence[Tensor]) -> bool:
        """Whether a call that differs in dynamic dimensions is served: every guard on them holds."""
        if self.dims is None or (signature.call, signature.request) != (self.signature.call, self.signature.request):
            return False
        for shape, traced, dims in zip(signature.shapes, self.signature.shapes, self.dims, strict=True):
            if len(shape) != len(traced) or any(
                a != b and d not in dims for d, (a, b) in enumerate(zip(shape, traced, strict=True))
            ):
                return False
        try:
            return self.guards.hold(tensors)
        except ZeroDivisionError:  # of a size by one that is zero, for which it was not traced
            return False

    @cached_property
    def guards(self) -> Guards:
        """What the model and the rules assumed of the dynamic sizes."""
        arguments = [
            (what.index, node.meta["val"])
            for what, node in zip(self.program.inputs, self.program.placeholders, strict=True)
            if what.kind == "argument"
        ]
        return Guards([value for _, value in sorted(arguments, key=lambda pair: pair[0])])

    def stacks_of(self, tangents: Any) -> list[Tensor] | None:
        """The tangents in the graph's order, or None if they are not for the same seeds; Dynamo reads this."""
        if isinstance(tangents, dict) and self.seeds.by_name:
            given = [name for name in tangents if tangents[name] is not None]
            same = len(given) == len(self.seeds.given_as) and all(name in given for name in self.seeds.given_as)
            return factors([tangents[name].contiguous() for name in self.seeds.given_as]) if same else None
        leaves = pytree.tree_leaves(tangents)
        given = [leaf for leaf in leaves if leaf is not None]
        alike = [axes_alike(leaf) for leaf in given]
        if [leaf is not None for leaf in leaves] != self.seeds.present or alike != [*self.seeds.alike]:
            return None
        return [once(leaf, axes).contiguous() for leaf, axes in zip(given, alike, strict=True)]

    def fits(self, tensors: Sequence[Tensor], stacks: Sequence[Tensor], others: list[Any]) -> bool:
        """Whether this served these kinds of tensors, other arguments and modules before; Dynamo reads this."""
        kinds = [[argument_kind_of(t) for t in tensors], [kind_of(t) for t in stacks]]
        same = kinds in self.traced_with and others == self.others and modes() == self.modes
        return same and self._has_its_modules()

    def _has_its_modules(self) -> bool:
        """Whether the modules are as they were, as far as Dynamo can compare them; Dynamo reads this."""
        same = all([modules_of(top) == known for top, known in self.parts]) and self.program.is_tied_as_it_was()
        return same and all([getattr(module, name, None) == value for module, name, value in self.settings])

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether what the signature cannot see is as it was."""
        return is_as_captured(self.program, self.outside, tensors)

    def __call__(
        self, tensors: Sequence[Tensor], tangents: Sequence[Tensor], given: Arguments | None = None
    ) -> HyperDual:
        """Evaluate; buffers and arguments that the model changes are updated from the primal, once.

        Inside a model that is captured itself this is a part of it, whose derivatives go on.
        """
        inputs = [what.value(tensors) for what in self.program.inputs]
        refuse_overlaps(self.program, inputs)
        run, gradients = (Part(self.compiled.final).run, nullcontext()) if is_a_part() else (self.run, torch.no_grad())
        with gradients, without_autocast():
            flat = run(*inputs, *tangents)
            return self.result(flat, tensors, given)

    def result(self, flat: Sequence[Any], tensors: Sequence[Tensor], given: Arguments | None = None) -> HyperDual:
        """Change what the model changes, in itself and its arguments; give the outputs the result's own structure."""
        duals = self.compiled.layout.unpack(flat)
        values: list[HyperDual] = []
        assigned: list[Tensor] = []
        for what, dual in zip(self.program.outputs, duals, strict=True):
            if what.changes is None:
                values.append(dual)
            elif what.kind == "assignment":
                assigned.append(dual.primal)
            else:
                what.apply(dual.primal, tensors)
        self.program.assign(assigned, tensors, given)
        rebuild = self.program.structure.rebuild
        primal = rebuild([v.primal for v in values])
        asked = values[:1] if self.with_loss else values
        tangent = [self._filled(v.primal, v.tangent, (self.components.directions,)) for v in asked]
        cross = [self._filled(v.primal, v.cross, self._cross_shape()) for v in asked]
        if self.with_loss:
            loss, output = primal
            return self._dual(loss, tangent[0], cross[0], output)
        return self._dual(primal, self._like_the_result(tangent), self._like_the_result(cross))

    def _like_the_result(self, parts: Sequence[Tensor | None]) -> Any:
        """Components in the structure of the result, None for what has none."""
        try:
            return self.program.structure.rebuild(parts, lambda _: None)
        except Exception as error:
            raise CaptureError(
                f"model: what it returns cannot be made of derivatives, with None for what has none "
                f"({type(error).__name__}: {error}); return its tensors in a tuple or a dictionary"
            ) from error

    def _dual(self, primal: Any, tangent: Any, cross: Any, output: Any = None) -> HyperDual:
        """The result, of what was asked for."""
        first, second = self.first_order, self.components.second_order
        return HyperDual(
            primal, tangent if first else None, cross if second else None, output=output, components=self.components
        )

    def _cross_shape(self) -> tuple[int, ...]:
        return () if self.components.second_order == "trace" else (self.components.count,)

    def _filled(self, primal: Tensor, part: Tensor | None, lead: tuple[int, ...]) -> Tensor | None:
        """A structural zero becomes zeros here, outside the graph; an integer leaf has no component."""
        if part is not None or not (primal.is_floating_point() or primal.is_complex()):
            return part
        return torch.zeros(lead + primal.shape, dtype=primal.dtype, device=primal.device)


def _inputs_like(program: Program) -> list[Any]:
    """What the inputs of a graph are, and of which kinds."""
    placed = [(what, node.meta["val"]) for what, node in zip(program.inputs, program.placeholders, strict=True)]
    return [(what.kind, what.name, what.index, kind_of(val), unusual_strides_of(val)) for what, val in placed]


@dataclass(frozen=True)
class Evaluation:
    """A specialisation with the tensors and directions of one call, and its arguments where the model changes those."""

    specialization: Specialization
    tensors: Sequence[Tensor]
    stacks: Sequence[Tensor]
    given: Arguments | None = None

    def __call__(self) -> HyperDual:
        try:
            return self.specialization(self.tensors, self.stacks, self.given)
        except Exception as error:
            if self._runs_a_program() and not isinstance(error, FomohError) and not _is_out_of_memory(error):
                self._operator_by_operator()
            explain(error)
            raise

    def _runs_a_program(self) -> bool:
        """Whether the graph is lowered, and no part of a model that is captured, which would record a second run."""
        return self.specialization.run is not self.specialization.compiled.final and not is_a_part()

    def _operator_by_operator(self) -> None:
        """Raise what a compiled program raised, from the operator that does; those programs do not know their lines."""
        inputs = [what.value(self.tensors) for what in self.specialization.program.inputs]
        try:
            with torch.no_grad(), without_autocast():
                self.specialization.compiled.final(*inputs, *self.stacks)
        except Exception as error:
            explain(error)
            raise error from None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def outside_of(program: Program) -> Reading:
    """What can be read of the modules that the model or the loss refers to without owning them."""
    reader = Reader()
    return Reading(tuple(map(reader.modules, program.outside)), reader.kept)


def is_as_captured(program: Program, outside: Reading, tensors: Sequence[Tensor]) -> bool:
    """Whether what no signature can see is as it was: what a function or loss refers to, and constants."""
    if outside_of(program) != outside or not program.has_its_structures() or not program.is_tied_as_it_was():
        return False
    if not program.has_its_numbers():
        return False
    for what, node in zip(program.inputs, program.placeholders, strict=True):
        traced = node.meta["val"]
        if what.kind != "argument":
            now = what.value(())
            if not isinstance(now, Tensor) or (now in COMPUTED_FROM and what not in program.detached):
                return False
            if (now.shape, now.dtype, now.device) != (traced.shape, traced.dtype, traced.device):
                return False
    if not program.has_its_ties() or not has_its_layouts(program, tensors):
        return False
    return all(_is_equal(what.value(tensors), value) for what, value in program.constants)


def _is_equal(now: Any, value: Tensor) -> bool:
    """Whether it is a tensor of the same kind and the same numbers; not a number counts as equal to itself."""
    if not isinstance(now, Tensor) or (now.dtype, now.device) != (value.dtype, value.device):
        return False
    if not value.is_floating_point():
        return torch.equal(now, value)
    return now.shape == value.shape and bool(((now == value) | (now.isnan() & value.isnan())).all())
