"""What one evaluation of a model may change, so that it can be put back: its state and the random numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fomoh_fx.capture import Input
from fomoh_fx.capture.state import containers, is_record
from fomoh_fx.specialization import Evaluation
from fomoh_fx.transform import HyperDualModule


class State:
    """What an evaluation changes: the attributes of modules, what is in containers there, and tensors in place.

    The modules are the model's, the loss's, and those that they refer to.
    """

    def __init__(self, hd: HyperDualModule, evaluation: Evaluation) -> None:
        program = evaluation.specialization.program
        self._contents: dict[int, tuple[Any, Any]] = {}  # of a container, by its identity, and a copy of it
        seen: set[int] = set()
        roots = [root for root in (hd.model, hd.loss, *program.outside) if isinstance(root, nn.Module)]
        for part in dict.fromkeys(part for root in roots for part in root.modules()):
            inside = [container for _, container in containers(part, seen)]
            for holder in (vars(part), part._buffers, *inside):
                holder = vars(holder) if is_record(holder) else holder
                if not isinstance(holder, tuple):
                    self._contents[id(holder)] = holder, _copied(holder)
        changed = [program.inputs[i].value(evaluation.tensors) for i in program.changed]
        self._copies = {id(x): (x, x.clone()) for x in changed}

    def restore(self, unless: Tensor | None = None) -> None:
        """Put everything back, or leave it where ``unless``, a 0-dim bool, is True."""
        changed = [(holder, before) for holder, before in self._contents.values() if not _is_same(holder, before)]
        if changed and (unless is None or not unless):
            for holder, before in changed:
                _fill(holder, before)
        for x, kept in self._copies.values():
            x.copy_(kept if unless is None else torch.where(unless.to(kept.device), x, kept))

    def before(self, what: Input, arguments: Sequence[Tensor]) -> Tensor:
        """The tensor that an input of a graph was."""
        if what.module is None or what.kind in ("parameter", "argument"):
            value = what.value(arguments)
        else:
            buffers, attributes = (self._contents[id(held)][1] for held in (what.module._buffers, vars(what.module)))
            value = (buffers if what.attribute in buffers else attributes)[what.attribute]
            for key in what.inside:
                value = vars(value) if is_record(value) else value
                value = self._contents[id(value)][1][key] if id(value) in self._contents else value[key]
        return self._copies[id(value)][1] if id(value) in self._copies else value


def _copied(holder: Any) -> Any:
    return list(holder) if isinstance(holder, (list, deque)) else dict(holder)


def _is_same(holder: Any, before: Any) -> bool:
    if len(holder) != len(before):
        return False
    if isinstance(before, list):
        return all(now is then for now, then in zip(holder, before, strict=True))
    return all(name in holder and holder[name] is value for name, value in before.items())


def _fill(holder: Any, before: Any) -> None:
    holder.clear()
    holder.extend(before) if isinstance(before, list) else holder.update(before)


class RandomState:
    """The state of torch's default generators, on the CPU and on the module's devices."""

    def __init__(self, module: nn.Module) -> None:
        self.devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the same numbers as from here, and go on afterwards as if nothing had been drawn."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
