"""What one evaluation of a model may change, so that it can be put back: its state and the random numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fomoh_fx.capture import Input
from fomoh_fx.capture.in_place import Snapshot
from fomoh_fx.capture.state import containers
from fomoh_fx.containers import attributes, is_record
from fomoh_fx.specialization import Evaluation
from fomoh_fx.transform import HyperDualModule


class State:
    """What an evaluation changes: the attributes of modules, what is in containers there, and tensors in place.

    The modules are the model's, the loss's, and those that they refer to.
    """

    def __init__(self, hd: HyperDualModule, evaluation: Evaluation) -> None:
        program = evaluation.specialization.program
        self._contents: dict[int, tuple[Any, Any]] = {}  # by the identity of a container, with a copy
        seen: set[int] = set()
        places = (hd.model, hd.loss, evaluation.given, *program.outside)
        roots = [root for root in places if isinstance(root, nn.Module)]
        for part in dict.fromkeys(part for root in roots for part in root.modules()):
            inside = [container for _, container in containers(part, seen)]
            for container in (vars(part), part._buffers, *inside):
                holder = attributes(container) if is_record(container) else container
                if not isinstance(holder, tuple):
                    self._contents[id(container)] = holder, _copied(holder)
        held = [value for _, copied in self._contents.values() for value in _values(copied)]
        self._plain = [snapshot for value in held if (snapshot := Snapshot.of(value)) is not None]
        changed = [program.inputs[i].value(evaluation.tensors) for i in program.changed]
        self._copies = {id(x): (x, x.clone()) for x in changed}

    def restore(self, unless: Tensor | None = None) -> None:
        """Put everything back, or leave it where ``unless``, a 0-dim bool, is True."""
        changed = [(holder, before) for holder, before in self._contents.values() if not _is_same(holder, before)]
        plain = [snapshot for snapshot in self._plain if snapshot.has_changed()]
        if (changed or plain) and (unless is None or not unless):
            for holder, before in changed:
                _fill(holder, before)
            for snapshot in plain:
                snapshot.put(snapshot.before)
        for x, kept in self._copies.values():
            x.copy_(kept if unless is None else torch.where(unless.to(kept.device), x, kept))

    def before(self, what: Input, arguments: Sequence[Tensor]) -> Tensor:
        """The tensor that an input of a graph was."""
        if what.module is None or what.kind in ("parameter", "argument"):
            value = what.value(arguments)
        else:
            buffers, others = (self._contents[id(held)][1] for held in (what.module._buffers, vars(what.module)))
            value = (buffers if what.attribute in buffers else others)[what.attribute]
            for key in what.inside:
                value = self._contents[id(value)][1][key] if id(value) in self._contents else value[key]
        return self._copies[id(value)][1] if id(value) in self._copies else value


def _copied(holder: Any) -> Any:
    return list(holder) if isinstance(holder, (list, deque)) else dict(holder)


def _values(copied: Any) -> Iterable[Any]:
    return copied if isinstance(copied, list) else copied.values()


def _is_same(holder: Any, before: Any) -> bool:
    """Whether it has the same things, under the same keys in the same order."""
    if len(holder) != len(before):
        return False
    if isinstance(before, list):
        return all(now is then for now, then in zip(holder, before, strict=True))
    items = zip(holder.items(), before.items(), strict=True)
    return all(value is then and name == other for (name, value), (other, then) in items)


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
