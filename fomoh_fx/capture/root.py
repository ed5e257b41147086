"""The model and the loss of one call as a module of tensors, and what its runs under a frontend show."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from fomoh_fx.capture.assignment import Assignment, ChangedData, Same, kept_elsewhere
from fomoh_fx.capture.assignments import Assignments
from fomoh_fx.capture.call import Arguments, Call, Structure
from fomoh_fx.capture.constants import AsConstants, argument
from fomoh_fx.capture.conversions import conversions_checked
from fomoh_fx.capture.finite import AssumeFinite
from fomoh_fx.capture.generators import GeneratorsRefused
from fomoh_fx.capture.hooks import gradient_hooks_checked, refuse_hooks_of_module
from fomoh_fx.capture.leaks import has_tensors_behind
from fomoh_fx.capture.modules import calls_noticed
from fomoh_fx.capture.semantics import ReverseModeSemantics
from fomoh_fx.capture.state import replaced
from fomoh_fx.errors import ArgumentError, CaptureError
from fomoh_fx.passes.provenance import RecordSourceLines


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
                semantics, RecordSourceLines(), AssumeFinite(), GeneratorsRefused(), assignments,
                self._modules_observed(assignments), conversions_checked(self), gradient_hooks_checked(),
            ):  # fmt: skip
                stack.enter_context(context)
            output = self.model(*args, **kwargs)
            value = output if self.loss is None else self.loss(output, *targets)
        if self.loss is not None:
            _check_loss(value)
        result = output if self.loss is None else (value, output)
        self.observed.structure, found = Structure.of(result)
        if not any(t.is_floating_point() or t.is_complex() for t in found):
            raise ArgumentError(
                f"model: returns no floating-point tensor, so it has no derivative (it returned {result!r})"
            )
        self.observed.numbers = [*assignments.numbers, *self._learning(semantics, names)]
        self.observed.assigned = self._assigned(assignments)
        changes = self.observed.assigned or self.observed.numbers
        if changes and self.call.has_shared(m for m in self.modules() if m not in (self, self.given)):
            raise CaptureError(
                "model: is given one list, dictionary or object in two places, or one that it has itself, and changes "
                "what it has or is given; a graph has one of its own in each place: pass copies, or pass it once"
            )
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

    def _modules_observed(self, assignments: Assignments) -> AbstractContextManager[None]:
        """Note modules that run without being part of this one: a function refers to them, or the model hides them."""
        self.observed.outside.clear()
        known = {id(vars(m)) for m in self.modules()}  # a tracer wraps modules in others that share their attributes

        def note(module: nn.Module) -> None:
            refuse_hooks_of_module(module)
            stateless_graph = isinstance(module, fx.GraphModule) and not module.state_dict()  # a branch being traced
            if id(vars(module)) not in known and not stateless_graph:
                self.observed.outside.append(weakref.ref(module))
                for part in module.modules():
                    assignments.watch(part)
                known.update(id(vars(m)) for m in module.modules())

        return calls_noticed(note)


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
