"""One specialisation: a captured and compiled graph for one signature, and how its inputs and outputs are wired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fomoh_fx.capture import Program
from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.passes.pipeline import Compiled
from fomoh_fx.passes.retrace import without_autocast
from fomoh_fx.seeds import Seeds
from fomoh_fx.signature import Signature


@dataclass
class Specialization:
    """The expansion for one signature.

    Attributes:
        program: what was captured.
        compiled: every stage of the graph.
        components: which components it propagates.
        owners: for each parameter or buffer input the module that holds it, and its name there.
        with_loss: whether the first result is the loss and the second the model's output.
        seeds: what the tangents belong to.
        signature: of the call that was traced.
        dims: the dynamic dimensions of each argument, or None where everything is static.
        traced_with: shape, dtype and device of each argument and tangent.
        others: the arguments that are not tensors.
        modes: the training flags and autocast.
        run: the final graph, or its lowered form.
    """

    program: Program
    compiled: Compiled
    components: Components
    owners: dict[int, tuple[nn.Module, str]]
    with_loss: bool
    seeds: Seeds
    signature: Signature
    dims: list[dict[int, Any]] | None
    traced_with: list[tuple[torch.Size, torch.dtype, torch.device]]
    others: list[Any]
    modes: list[Any]
    run: Callable[..., Any]

    @property
    def stages(self) -> dict[str, fx.GraphModule]:
        return self.compiled.stages

    def serves(self, signature: Signature, tensors: Sequence[Tensor]) -> bool:
        """Whether a call that differs in dynamic dimensions is served: every guard on them holds."""
        if self.dims is None or signature.rest != self.signature.rest:
            return False
        for shape, traced, dims in zip(signature.shapes, self.signature.shapes, self.dims, strict=True):
            if len(shape) != len(traced) or any(
                a != b and d not in dims for d, (a, b) in enumerate(zip(shape, traced))
            ):
                return False
        placeholders = self.program.placeholders
        fakes = {w.index: n.meta["val"] for w, n in zip(self.program.inputs, placeholders) if w.kind == "argument"}
        values = [fakes[i] for i in range(len(tensors))]
        shape_env = values[0].fake_mode.shape_env
        return bool(shape_env.evaluate_guards_for_args(values, tensors, ignore_static=False))

    def stacks_of(self, tangents: Any) -> list[Tensor] | None:
        """The tangents in the graph's order, or None if they are not for the same seeds; Dynamo reads this."""
        if isinstance(tangents, dict) and self.seeds.by_name:
            given = [name for name in tangents if tangents[name] is not None]
            same = len(given) == len(self.seeds.given_as) and all(name in given for name in self.seeds.given_as)
            return [tangents[name] for name in self.seeds.given_as] if same else None
        leaves = pytree.tree_leaves(tangents)
        present = [leaf is not None for leaf in leaves]
        return [leaf for leaf in leaves if leaf is not None] if present == self.seeds.present else None

    def fits(self, tensors: Sequence[Tensor], stacks: Sequence[Tensor], others: list[Any], modes: list[Any]) -> bool:
        """Whether this was traced with these shapes, dtypes, devices, other arguments and modes; Dynamo reads this."""
        shapes = [(t.shape, t.dtype, t.device) for t in (*tensors, *stacks)]
        return shapes == self.traced_with and others == self.others and modes == self.modes

    def __call__(self, tensors: Sequence[Tensor], tangents: Sequence[Tensor]) -> HyperDual:
        """Evaluate; buffers and arguments that the model changes are updated from the primal, once."""
        inputs = self.inputs(tensors)
        with torch.no_grad(), without_autocast():
            flat = self.run(*inputs, *tangents)
            return self.result(flat, inputs)

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The current value of every primal input, in the graph's order."""
        values: list[Tensor] = []
        for i, what in enumerate(self.program.inputs):
            if what.kind == "argument":
                values.append(tensors[what.index])
            elif what.kind == "constant":
                assert what.tensor is not None
                values.append(what.tensor)
            else:
                owner, name = self.owners[i]
                values.append(getattr(owner, name))
        return values

    def result(self, flat: Sequence[Any], inputs: Sequence[Tensor]) -> HyperDual:
        """Write back the new buffers, and give the outputs the result's own structure."""
        duals = self.compiled.layout.unpack(flat)
        values: list[HyperDual] = []
        for what, dual in zip(self.program.outputs, duals, strict=True):
            if what.kind == "value":
                values.append(dual)
            else:
                inputs[self._position(what.kind, what.name, what.index)].copy_(dual.primal)
        rebuild = self.program.structure.rebuild
        primal = rebuild([v.primal for v in values])
        asked = values[:1] if self.with_loss else values
        tangent = [self._filled(v.primal, v.tangent, (self.components.directions,)) for v in asked]
        cross = [self._filled(v.primal, v.cross, self._cross_shape()) for v in asked]
        if self.with_loss:
            loss, output = primal
            return HyperDual(loss, tangent[0], cross[0], output, self.components)
        none = lambda _: None  # noqa: E731  a leaf without derivative
        second = self.components.second_order
        return HyperDual(
            primal, rebuild(tangent, none), rebuild(cross, none) if second else None, None, self.components
        )

    def _position(self, kind: str, name: str, index: int) -> int:
        for i, what in enumerate(self.program.inputs):
            if what.kind == kind and (what.name == name if kind == "buffer" else what.index == index):
                return i
        raise AssertionError(f"no input {kind} {name}")

    def _cross_shape(self) -> tuple[int, ...]:
        return () if self.components.second_order == "trace" else (self.components.count,)

    def _filled(self, primal: Tensor, part: Tensor | None, lead: tuple[int, ...]) -> Tensor | None:
        """A structural zero becomes zeros here, outside the graph; an integer leaf has no component."""
        if part is not None or not (primal.is_floating_point() or primal.is_complex()):
            return part
        return torch.zeros(lead + primal.shape, dtype=primal.dtype, device=primal.device)


def owners_of(program: Program, modules: Mapping[str, nn.Module]) -> dict[int, tuple[nn.Module, str]]:
    """Where the parameters and buffers of a program live: ``modules`` maps the prefixes "" and "loss" to the roots."""
    owners = {}
    for i, what in enumerate(program.inputs):
        if what.kind in ("parameter", "buffer"):
            prefix = "loss" if what.name.startswith("loss.") and "loss" in modules else ""
            path = what.name.removeprefix("loss.") if prefix else what.name
            parent, _, leaf = path.rpartition(".")
            owners[i] = (modules[prefix].get_submodule(parent), leaf)
    return owners
