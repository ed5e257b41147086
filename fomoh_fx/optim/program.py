"""Programs: the parts of a step around the evaluation, each one program, lowered as the evaluation is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fomoh_fx import lower
from fomoh_fx.passes.retrace import without_autocast

#: A product of a row and a stack of directions is a sum that fuses with what follows it, where a program is lowered.
_FUSIBLE = {torch.ops.aten.mm.default: lambda a, b: (a.unsqueeze(-1) * b).sum(-2)}
_COMPUTED = -1  # the source of an output that is none of the inputs


class Remembering(Protocol):
    """An object that remembers tensors from step to step."""

    #: Names of the attributes that a step changes: tensors, or dictionaries of tensors.
    remembers: ClassVar[Sequence[str]]
    #: Names of those that decide what it does: numbers and the like.
    settings: ClassVar[Sequence[str]]


class Program:
    """A function of tensors, traced once for arguments of the same kind and the same settings.

    Args:
        function: of tensors in containers. It may change arguments in place, and what ``memories`` remember.
        lowering: that of the evaluation; in eager mode the function itself runs.
    """

    def __init__(self, function: Callable[..., Any], lowering: lower.Lowering) -> None:
        self.function, self.lowering = function, lowering
        self._programs: dict[Any, Callable[[Sequence[Tensor]], Any]] = {}

    def __call__(self, memories: Sequence[Remembering], *arguments: Any) -> Any:
        """The function of the arguments; a caller's autocast is for the model and not for this.

        Args:
            memories: what it reads and assigns beside them; their settings are constants of a program.
        """
        with without_autocast():
            return self._run(memories, *arguments)

    def _run(self, memories: Sequence[Remembering], *arguments: Any) -> Any:
        if self.lowering is lower.eager:
            return self.eager(memories, *arguments)
        leaves, spec = pytree.tree_flatten((_remembered(memories, _device_of(arguments)), arguments))
        settings = tuple(tuple(getattr(memory, name) for name in memory.settings) for memory in memories)
        key = spec, tuple(map(_kind_of, leaves)), settings
        if key not in self._programs:
            self._programs[key] = self._traced(memories, leaves, spec)
        result, remembered = self._programs[key]([leaf for leaf in leaves if isinstance(leaf, Tensor)])
        _remember(memories, remembered)
        return result

    def __getstate__(self) -> dict[str, Any]:
        """A copy traces anew."""
        return {**self.__dict__, "_programs": {}}

    def eager(self, memories: Sequence[Remembering], *arguments: Any) -> Any:
        """The function as it is written."""
        with without_autocast():
            return self.function(*arguments)

    def _traced(
        self, memories: Sequence[Remembering], leaves: Sequence[Any], spec: pytree.TreeSpec
    ) -> Callable[[Sequence[Tensor]], Any]:
        found: list[Any] = []

        def flat(*tensors: Tensor) -> list[Tensor]:
            given = iter(tensors)
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            remembered, arguments = pytree.tree_unflatten(filled, spec)
            before = _remembered(memories)
            _remember(memories, remembered)
            try:
                result = self.function(*arguments), _remembered(memories)
            finally:
                _remember(memories, before)
            found[:] = pytree.tree_flatten(result)
            found.append({id(x): i for i, x in enumerate(tensors)})
            return [x for x in found[0] if isinstance(x, Tensor) and id(x) not in found[2]]

        record = make_fx(flat, _FUSIBLE, "fake", _allow_non_fake_inputs=True)
        module = record(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        assert not any(c.is_floating_point() for c in module.buffers()), "numbers that nobody said to remember"
        outputs, out_spec, numbers = found
        sources = [numbers.get(id(x), _COMPUTED) if isinstance(x, Tensor) else None for x in outputs]
        constants = [None if isinstance(x, Tensor) else x for x in outputs]
        module.graph.eliminate_dead_code()
        module.recompile()
        run = self.lowering(module, False) if any(n.op == "call_function" for n in module.graph.nodes) else module

        def program(tensors: Sequence[Tensor]) -> Any:
            computed = iter(run(*tensors))
            values = [
                constant if source is None else next(computed) if source == _COMPUTED else tensors[source]
                for source, constant in zip(sources, constants, strict=True)
            ]
            return pytree.tree_unflatten(values, out_spec)

        return program


def is_own(*values: Any) -> bool:
    """Whether these objects and functions are of this package, so that a program sees all that they read.

    Others may count, branch or draw as they please, and run as they are written.
    """
    package = __name__.partition(".")[0]
    whole = [value.func if isinstance(value, partial) else value for value in values]
    return all(value.__module__.partition(".")[0] == package for value in whole)


def _remembered(memories: Sequence[Remembering], device: torch.device | None = None) -> list[dict[str, Any]]:
    """What the memories hold; numbers that lie elsewhere come to the device, for which nothing waits."""

    def moved(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True) if device is not None and x.dim() == 0 else x

    held = [{name: getattr(memory, name) for name in memory.remembers} for memory in memories]
    return pytree.tree_map_only(Tensor, moved, held)


def _remember(memories: Sequence[Remembering], remembered: Sequence[dict[str, Any]]) -> None:
    for memory, values in zip(memories, remembered, strict=True):
        for name, value in values.items():
            setattr(memory, name, value)


def _device_of(arguments: Any) -> torch.device | None:
    return next((leaf.device for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)), None)


def _kind_of(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
