"""One thing that a call assigns, or plain data that it changes, and how every call does the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from fomoh_fx.capture.state import Keys, follow, written
from fomoh_fx.containers import is_record
from fomoh_fx.errors import CaptureError

#: Tensors that a call has assigned, and the parameter that each was computed from: the derivative ended with the call.
COMPUTED_FROM = WeakIdKeyDictionary()


@dataclass
class Same:
    """A leaf that is a tensor from before the run: a parameter, a buffer, an argument, or ``x.detach()`` of one.

    ``name`` is what the root calls it; ``value`` finds it for a call, given the call's arguments.
    """

    name: str
    is_detached: bool = False
    value: Callable[[Sequence[Tensor]], Tensor] | None = None

    def of(self, arguments: Sequence[Tensor]) -> Tensor:
        """The tensor itself, or another one with its memory, as in the model."""
        assert self.value is not None
        tensor = self.value(arguments)
        return tensor.detach() if self.is_detached else tensor


@dataclass
class Assignment:
    """One thing that a run assigns: a value at a key, nothing there any more, or all that is in a list.

    ``leaves`` are the leaves of the value, None for tensors that the run computes; ``tensors`` are those, and
    ``numbers`` tell which of them are one, among all that the run assigns. ``registers`` is for a buffer that the run
    registers: whether it is persistent.
    """

    path: str | None
    keys: Keys
    kind: Literal["set", "delete", "contents"]
    leaves: list[Any] = field(default_factory=list)
    spec: Any = None
    tensors: list[Tensor] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    is_new: bool = False
    registers: bool | None = None
    module: nn.Module | None = None
    computed_from: list[str | None] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As a person would write the place."""
        return f"{self.path}.{written(self.keys)}".removeprefix("model.")

    @property
    def is_tensor(self) -> bool:
        """Whether it is one tensor for an attribute of a module."""
        is_one = len(self.leaves) == 1 and (self.leaves[0] is None or isinstance(self.leaves[0], Same))
        return self.kind == "set" and len(self.keys) == 1 and is_one and self.spec.is_leaf()

    @property
    def count(self) -> int:
        """How many tensors it takes."""
        return sum(leaf is None for leaf in self.leaves)

    def filled(self, tensors: Sequence[Tensor], arguments: Sequence[Tensor]) -> list[Any]:
        """The leaves of the value for a call that has computed these tensors from these arguments."""
        for tensor, source in zip(tensors, self.computed_from, strict=True):
            if source is not None:
                COMPUTED_FROM[tensor] = source
        new = iter(tensors)
        return [
            next(new) if leaf is None else leaf.of(arguments) if isinstance(leaf, Same) else leaf[0]
            for leaf in self.leaves
        ]

    def apply(self, leaves: Sequence[Any], module: nn.Module | None) -> None:
        """Assign the value with these leaves, in a module."""
        assert module is not None
        value: Any = None if self.spec is None else pytree.tree_unflatten(leaves, self.spec)
        if self.kind == "contents":
            fill(follow(module, self.keys), value)
            return
        holder: Any = module if len(self.keys) == 1 else follow(module, self.keys[:-1])
        by_name = holder is module or is_record(holder)
        if self.registers is not None:
            module.register_buffer(self.keys[-1], value, persistent=self.registers)
        elif self.kind == "set":
            setattr(holder, self.keys[-1], value) if by_name else holder.__setitem__(self.keys[-1], value)
        elif by_name:
            delattr(holder, self.keys[-1])
        else:
            del holder[self.keys[-1]]


@dataclass
class ChangedData:
    """Plain data that a run has changed to others, and how to put them.

    What follows a dynamic dimension is ``size``, with PyTorch's symbolic numbers in it, and ``after`` is an example.
    With ``is_opaque`` it is another object at every call, and which one it is does not count. ``attribute`` is that of
    a class of modules.
    """

    key: tuple[int, Any]
    name: str
    put: Callable[[Any], None]
    before: Any
    after: Any
    size: Any = None
    is_opaque: bool = False
    attribute: tuple[type, str] = (nn.Module, "")

    @property
    def is_size(self) -> bool:
        return self.size is not None


class Lost:
    """Stands for an object with tensors of a run, which no later call can have, and notes that it is used."""

    def __init__(self, kind: type) -> None:
        self.kind, self.was_used = kind, False

    def _use(self, *_: Any, **__: Any) -> Any:
        self.was_used = True
        raise AttributeError(f"an object of type {self.kind.__name__} that an earlier call has made")

    __getattr__ = __call__ = __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = _use


def fill(holder: Any, values: Sequence[Any]) -> None:
    """Let a list have these values."""
    holder.clear()
    holder.extend(values)


def kept_elsewhere(where: str) -> CaptureError:
    """The refusal of a tensor of a run that stays in what is no attribute of a model."""
    return CaptureError(
        f"model: keeps a tensor that it computes in {where}, where later calls would find the first one for ever. "
        "Keep it in a buffer or another attribute of a module, or return it; a table of constants is filled by one "
        "call of the model itself before"
    )


def remembered(what: str, parameter: str) -> CaptureError:
    """The refusal of a tensor that an earlier call computed from a parameter: no graph of this call has the rest."""
    return CaptureError(
        f"model: uses {what} that an earlier call computed from the parameter {parameter!r} and kept, so its "
        "derivative would be lost. Compute it anew at every call, or detach it before it is kept; where it is a cache, "
        "clear it (model.train() and then model.eval() often do)"
    )
