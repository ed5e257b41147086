"""What capture produces: the graph, and what each of its inputs and outputs is."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal
from unittest.mock import patch

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fomoh_fx.capture.assignment import Assignment, ChangedData, Same, kept_elsewhere
from fomoh_fx.capture.assignments import Assignments
from fomoh_fx.capture.constants import AsConstants, argument
from fomoh_fx.capture.conversions import conversions_checked
from fomoh_fx.capture.finite import AssumeFinite
from fomoh_fx.capture.hooks import gradient_hooks_checked, refuse_hooks_of_module
from fomoh_fx.capture.leaks import has_tensors_behind
from fomoh_fx.capture.reading import COUNTED, are_equal
from fomoh_fx.capture.records import flattened
from fomoh_fx.capture.semantics import ReverseModeSemantics
from fomoh_fx.capture.state import Keys, follow, replaced, structure
from fomoh_fx.capture.threads import is_in
from fomoh_fx.errors import ArgumentError, CaptureError
from fomoh_fx.passes.dataflow import draws, graphs_in
from fomoh_fx.passes.provenance import RecordSourceLines

_ABSENT = object()
#: What a call has.
ARGUMENTS = ("args", "kwargs", "targets")


@dataclass(frozen=True)
class Input:
    """One input of the graph.

    ``name`` is the model's own name of a parameter or buffer (``loss.`` before those of a loss that is a module,
    ``outside.`` of a module that a function only refers to), or the argument's readable name; ``module`` and
    ``attribute`` say where a parameter, a buffer or a constant lives, and ``inside`` where in the containers below;
    ``index`` numbers the tensor leaves of the call; ``tensor`` is a captured constant that no module has.
    """

    kind: Literal["parameter", "buffer", "argument", "constant"]
    name: str
    index: int = -1
    tensor: Tensor | None = None
    module: nn.Module | None = None
    attribute: str = ""
    inside: Keys = ()

    @property
    def keys(self) -> Keys:
        """The place in the module."""
        return (self.attribute, *self.inside)

    def value(self, arguments: Sequence[Tensor]) -> Tensor:
        """The current tensor, among the arguments of a call or where it lives."""
        if self.kind == "argument":
            return arguments[self.index]
        if self.tensor is not None:
            return self.tensor
        assert self.module is not None
        return follow(self.module, self.keys)


@dataclass(frozen=True)
class Output:
    """One output of the graph: a leaf of the result, or a new value of ``changes``.

    A ``"change"`` is made in place; those for an ``"assignment"`` are assigned after it, by the program.
    """

    kind: Literal["value", "change", "assignment"]
    changes: Input | None = None

    def apply(self, value: Tensor, arguments: Sequence[Tensor]) -> None:
        """Change in place what the model changes."""
        assert self.changes is not None
        self.changes.value(arguments).copy_(value)


@dataclass
class Call:
    """The arguments of one call, with the tensors taken out: what is not a tensor is part of the signature.

    ``differentiated`` numbers the tensors that have tangents: a model may ask them whether they require a gradient.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[Any, ...]
    differentiated: Collection[int] = ()

    def __post_init__(self) -> None:
        leaves, self.spec = flattened((self.args, self.kwargs, self.targets))
        self.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self.tensors: list[Tensor] = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.others = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))

    def rebuild(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
        """The arguments with other tensors in place of the call's own."""
        mine, others = iter(tensors), iter(self.others)
        leaves = [next(mine) if is_tensor else next(others) for is_tensor in self.is_tensor]
        return pytree.tree_unflatten(leaves, self.spec)

    @property
    def holder(self) -> Arguments:
        """The arguments as a place."""
        return Arguments(self.args, self.kwargs, self.targets)


class Arguments(nn.Module):
    """The arguments of a call as a place where a model leaves something: a list that it fills, an object it changes."""

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.put(*given)

    def put(self, *given: Any) -> None:
        """Have these args, kwargs and targets, or none at all."""
        for name in ARGUMENTS:
            vars(self).pop(name, None)
        vars(self).update(zip(ARGUMENTS, given, strict=False))


@dataclass
class Structure:
    """The pytree of the result: which leaves are tensors, and the other leaves."""

    spec: pytree.TreeSpec
    leaves: list[Any]  # an int for the number of a tensor output, or _Constant

    @property
    def others(self) -> list[Any]:
        """The leaves that are not tensors."""
        return [leaf.value for leaf in self.leaves if isinstance(leaf, _Constant)]

    def rebuild(self, tensors: Sequence[Any], other: Callable[[Any], Any] = lambda value: value) -> Any:
        """The result with the given tensor leaves; ``other`` maps the leaves that are not tensors."""
        filled = [other(leaf.value) if isinstance(leaf, _Constant) else tensors[leaf] for leaf in self.leaves]
        return pytree.tree_unflatten(filled, self.spec)


@dataclass(frozen=True)
class _Constant:
    value: Any


@dataclass
class Observed:
    """What one run of the model under a frontend showed (kept apart: export restores a module's own attributes)."""

    structure: Structure | None = None
    semantics: ReverseModeSemantics | None = None
    constants: AsConstants | None = None
    before: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # what the run changes in place, and copies
    outside: list[weakref.ref[nn.Module]] = field(default_factory=list)  # modules called that are not the root's own
    assigned: list[Assignment] = field(default_factory=list)  # their tensors are the last outputs
    numbers: list[ChangedData] = field(default_factory=list)


class Root(nn.Module):
    """The model and the loss as one module of tensors: what the frontends trace."""

    def __init__(
        self,
        model: Any,
        loss: Any,
        call: Call,
        foreign: Sequence[Tensor] = (),
        outside: Sequence[nn.Module] = (),
        constants: Mapping[str, Tensor] | None = None,
        flags: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.constants, self.flags = constants, flags
        self.outside = nn.ModuleList(outside)
        self.call, self.observed = call, Observed()
        self.given = Arguments()
        self.foreign = list(foreign)
        for i, tensor in enumerate(foreign):
            self.register_buffer(f"foreign_{i}", tensor)
        self.own = self._every()

    def _own(self) -> dict[str, Tensor]:
        """The parameters and buffers by name; what stands for them, while a frontend runs this."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def _every(self) -> dict[str, Tensor]:
        """The same under all names that they have."""
        tables = (self.named_parameters(remove_duplicate=False), self.named_buffers(remove_duplicate=False))
        return {name: tensor for table in tables for name, tensor in table}

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        try:
            return self._run(tensors)
        finally:
            self.given.put()

    def _run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        with ExitStack() as stack:
            constants = self.observed.constants = stack.enter_context(AsConstants(self, self.constants, self.flags))
            given = constants.of(tensors)
            args, kwargs, targets = self.call.rebuild(given)
            self.given.put(args, kwargs, targets)
            known = {id(t): getattr(self, f"foreign_{i}") for i, t in enumerate(self.foreign)}
            known |= {id(self.own[name]): t for name, t in self._own().items() if name in self.own}
            leaves = [tensors[i] for i in self.call.differentiated]
            names = self._names(given)
            # The model meets its own tensors, which it may have elsewhere, too; functions get what stands for them.
            stack.enter_context(replaced(self, {id(t): self.own[name] for name, t in self._every().items()}))
            assignments = Assignments(self)
            semantics = self.observed.semantics = ReverseModeSemantics(known, self.observed.before, leaves, names)
            assignments.same = partial(_same, names, semantics)
            for context in (
                semantics, RecordSourceLines(), AssumeFinite(), assignments, self._observe_modules(assignments),
                conversions_checked(self), gradient_hooks_checked(),
            ):  # fmt: skip
                stack.enter_context(context)
            output = self.model(*args, **kwargs)
            value = output if self.loss is None else self.loss(output, *targets)
        if self.loss is not None:
            _check_loss(value)
        result = output if self.loss is None else (value, output)
        leaves, spec = flattened(result)
        found: list[Tensor] = []
        places: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                places.append(len(found))
                found.append(leaf)
            elif has_tensors_behind(leaf):
                raise CaptureError(
                    f"model: returns a tensor inside a {type(leaf).__name__}, where no call can put its own; return it "
                    "in a tuple, a dictionary or a dataclass"
                )
            else:
                places.append(_Constant(leaf))
        self.observed.structure = Structure(spec, places)
        if not any(t.is_floating_point() or t.is_complex() for t in found):
            raise ArgumentError(
                f"model: returns no floating-point tensor, so it has no derivative (it returned {result!r})"
            )
        self.observed.numbers = [*assignments.numbers, *self._learning(semantics, names)]
        self.observed.assigned = self._assigned(assignments)
        constants.changed |= {f"{made.path}.{made.keys[0]}" for made in self.observed.assigned} & {*constants.put}
        new = [tensor for made in self.observed.assigned for tensor in made.tensors]
        return [*map(semantics.own, [*found, *new])]

    def _names(self, given: Sequence[Tensor]) -> dict[int, str]:
        """What this calls tensors from before the run, and what stands for them, by identity."""
        names = {id(t): argument(i) for i, t in enumerate(given)}
        for name, tensor in (*self.own.items(), *self._every().items()):
            names.setdefault(id(tensor), name)
        return names

    def _assigned(self, assignments: Assignments) -> list[Assignment]:
        """What the run assigns anew, in the end."""
        made = [a for a in assignments.made if not assignments.is_as_before(a, self._at(a.path), self.own)]
        for leaf in (leaf[0] for a in made for leaf in a.leaves if isinstance(leaf, tuple)):
            if not assignments.watches(leaf) and has_tensors_behind(leaf):
                raise kept_elsewhere(f"an object of type {type(leaf).__name__}")
        numbers: dict[int, int] = {}
        for a in made:
            a.numbers = [numbers.setdefault(id(tensor), len(numbers)) for tensor in a.tensors]
        return made

    def _learning(self, semantics: ReverseModeSemantics, names: Mapping[int, str]) -> Iterator[ChangedData]:
        """What of its own requires a gradient after the run and did not before, or the other way round."""
        for key, (tensor, learns) in semantics.learning.items():
            if learns != tensor.requires_grad and (own := self.own.get(names[key])) is not None:
                name = f"{names[key].removeprefix('model.')}.requires_grad"
                put = partial(setattr, own, "requires_grad")
                yield ChangedData((id(own), "requires_grad"), name, put, tensor.requires_grad, learns)

    def _at(self, path: str | None) -> nn.Module:
        return self.get_submodule(path or "")

    @contextmanager
    def _observe_modules(self, assignments: Assignments) -> Iterator[None]:
        """Note modules that run without being part of this one: a function refers to them, or the model hides them."""
        self.observed.outside.clear()
        known = {id(vars(m)) for m in self.modules()}  # a tracer wraps modules in others that share their attributes

        thread = threading.get_ident()

        def note(module: nn.Module) -> None:
            refuse_hooks_of_module(module)
            stateless_graph = isinstance(module, fx.GraphModule) and not module.state_dict()  # a branch being traced
            if id(vars(module)) not in known and not stateless_graph:
                self.observed.outside.append(weakref.ref(module))
                for part in module.modules():
                    assignments.watch(part)
                known.update(id(vars(m)) for m in module.modules())

        call = nn.Module._call_impl

        def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_in(thread):
                note(module)
            return call(module, *args, **kwargs)

        # with a global hook, a hook that a module installs in its forward would act already in that call
        with patch.object(nn.Module, "_call_impl", noted):
            yield


def _same(names: Mapping[int, str], semantics: ReverseModeSemantics, tensor: Tensor) -> Same | None:
    """What a tensor is that has a name, or is one of those without its derivative; None for others."""
    if id(tensor) in names:
        return Same(names[id(tensor)])
    source = semantics.source_of(tensor)
    return Same(names[id(source)], is_detached=True) if source is not None and id(source) in names else None


def _check_loss(value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ArgumentError(f"loss: must return a scalar tensor, got {type(value).__name__}")
    if value.dim() != 0:
        raise ArgumentError(
            f"loss: must return a scalar tensor, got shape {tuple(value.shape)}; reduce it, e.g. by mean()"
        )
    if not value.is_floating_point():
        raise ArgumentError(f"loss: must return a real floating-point tensor, got {value.dtype}")


@dataclass
class Program:
    """A captured model: a functional ATen graph and what its inputs and outputs are."""

    module: fx.GraphModule
    inputs: list[Input]
    outputs: list[Output]
    structure: Structure
    frontend: str
    outside: Sequence[nn.Module] = ()
    layouts: Sequence[
        tuple[tuple[int, ...], int]
    ] = ()  # strides and offsets of the inputs, where the graph is for them
    goes_by_offset: bool = False
    constants: Sequence[tuple[Input, Tensor]] = ()  # buffers and arguments, and the values that the graph is for
    refused: list[str] = field(default_factory=list)
    assignments: Sequence[Assignment] = ()  # their tensors are the last outputs
    numbers: Sequence[ChangedData] = ()  # in containers, and the run changes them
    settled: Sequence[ChangedData] = ()  # what every call changes to the same
    counts: Sequence[tuple[nn.Module, str, float]] = ()  # attributes, and what every call adds; nothing depends on them
    read: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # by module, what its attributes were
    tied: Sequence[tuple[Input, Input]] = ()  # an input, and another place that had its tensor
    structures: Sequence[tuple[nn.Module, str, Any]] = ()  # attributes with containers, and what the graph is for
    detached: Sequence[Input] = ()  # inputs of which the graph has no derivative, as the model detaches them
    ties: Sequence[Sequence[tuple[nn.Module, Keys]]] = ()  # places that had one tensor, which is one input

    def assign(self, values: Sequence[Tensor], arguments: Sequence[Tensor], given: Arguments | None = None) -> None:
        """Assign what the model assigns, after all of it has been read; in the arguments, if they are given.

        Values are copied, for they may be any outputs or inputs: each tensor of the model once.
        """
        new = iter(values)
        copies: dict[int, Tensor] = {}
        leaves = []
        for made in self.assignments:
            for number in made.numbers:
                value = next(new)
                copies[number] = copies[number] if number in copies else value.clone()
            leaves.append(made.filled([copies[number] for number in made.numbers], arguments))
        for made, filled in zip(self.assignments, leaves, strict=True):
            if not isinstance(made.module, Arguments):
                made.apply(filled, made.module)
            elif given is not None:
                made.apply(filled, given)
        for change in self.settled:
            change.put(change.after)
        for module, name, step in self.counts:
            setattr(module, name, getattr(module, name) + step)

    def has_its_numbers(self) -> bool:
        """Whether what this graph counts up are numbers, and what others do is as it was: this one may depend on it."""
        if any(type(getattr(module, name, None)) not in (int, float) for module, name, _ in self.counts):
            return False
        own = {(id(module), name) for module, name, _ in self.counts}
        counted = [(m, name) for m, names in COUNTED.items() if id(m) in self.read for name in names]
        others = [(m, name) for m, name in counted if (id(m), name) not in own]
        return all(are_equal(self.read[id(m)].get(name, _ABSENT), getattr(m, name, _ABSENT)) for m, name in others)

    def is_tied_as_it_was(self) -> bool:
        """Whether what is one input is still one tensor; Dynamo reads this."""
        return all([one.value(()) is other.value(()) for one, other in self.tied])

    def has_its_structures(self) -> bool:
        """Whether the containers that the model changes or computes with have what they had at capture."""
        return all(structure(getattr(module, name, None)) == known for module, name, known in self.structures)

    def has_its_ties(self) -> bool:
        """Whether tensors that were one at capture still are, and others are not."""
        values = [id(what.value(())) for what in self.inputs if what.module is not None]
        return len(set(values)) == len(values) and all(map(_is_one_tensor, self.ties))

    @cached_property
    def changes_containers(self) -> bool:
        """Whether it leaves something in its arguments, beside tensors that it changes in place."""
        return any(isinstance(made.module, Arguments) for made in self.assignments)

    @cached_property
    def changed(self) -> dict[int, int]:
        """The inputs that are changed in place, by number, and the result that each becomes."""
        new = {what.changes: i for i, what in enumerate(self.outputs) if what.kind == "change"}
        return {i: new[what] for i, what in enumerate(self.inputs) if what in new}

    @cached_property
    def used(self) -> list[int]:
        """The numbers of the inputs that are changed in place or read, be it only to decide what the graph is."""
        decide = {_identity(what) for what, _ in self.constants}
        inputs = zip(self.placeholders, self.inputs, strict=True)
        return [
            i for i, (node, what) in enumerate(inputs) if node.users or i in self.changed or _identity(what) in decide
        ]

    @cached_property
    def draws(self) -> bool:
        """Whether it draws random numbers."""
        return any(draws(node.target) for part in graphs_in(self.module) for node in part.graph.nodes)

    @property
    def placeholders(self) -> list[fx.Node]:
        return self.module.graph.find_nodes(op="placeholder")

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The nodes that are returned, in the order of ``outputs``."""
        return self.module.graph.output_node().args[0]  # type: ignore[return-value]


def _identity(what: Input) -> tuple[str, int]:
    """Equal for two inputs that are one, under whatever name."""
    return (what.kind, what.index) if what.kind == "argument" else ("state", id(what.value(())))


def _is_one_tensor(places: Sequence[tuple[nn.Module, Keys]]) -> bool:
    try:
        return len({id(follow(module, keys)) for module, keys in places}) == 1
    except (AttributeError, LookupError):
        return False
