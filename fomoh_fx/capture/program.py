"""What capture produces: the graph, and what each of its inputs and outputs is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, fx, nn

from fomoh_fx.capture.assignment import Assignment, ChangedData
from fomoh_fx.capture.call import Arguments, Structure
from fomoh_fx.capture.reading import COUNTED, are_equal
from fomoh_fx.capture.state import Keys, follow
from fomoh_fx.containers import structure
from fomoh_fx.passes.dataflow import draws, graphs_in
from fomoh_fx.sizes import SYMBOLIC, evaluated

_ABSENT = object()


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
    settled: Sequence[ChangedData] = ()  # what every call changes to the same, but for sizes in it
    counts: Sequence[tuple[nn.Module, str, Any]] = ()  # attributes, and what every call adds; nothing depends on them
    overwritten: Sequence[tuple[nn.Module, str]] = ()  # attributes that every call sets to sizes, and does not read
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
        values, steps = self._in_call(arguments)
        for change, value in zip(self.settled, values, strict=True):
            change.put(value)
        for (module, name, _), step in zip(self.counts, steps, strict=True):
            setattr(module, name, getattr(module, name) + step)

    def _in_call(self, arguments: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
        """What data are settled to, and what is added to counts, with the sizes that the arguments have."""
        changes = [c.size if c.is_size else c.after for c in self.settled], [step for _, _, step in self.counts]
        if not self.keeps_sizes:
            return changes
        given = [i for i, what in enumerate(self.inputs) if what.kind == "argument"]
        examples = [self.placeholders[i].meta["val"] for i in given]
        return evaluated(changes, examples, [self.inputs[i].value(arguments) for i in given])

    @property
    def keeps_sizes(self) -> bool:
        """Whether it assigns sizes of dynamic dimensions."""
        counted = any(isinstance(step, SYMBOLIC) for _, _, step in self.counts)
        return counted or any(change.is_size for change in self.settled)

    def has_its_numbers(self) -> bool:
        """Whether what this graph counts up are numbers, and what others do is as it was: this one may depend on it."""
        if any(type(getattr(module, name, None)) not in (int, float) for module, name, _ in self.counts):
            return False
        attributes = [*self.overwritten, *((module, name) for module, name, _ in self.counts)]
        own = {(id(module), name) for module, name in attributes}
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
