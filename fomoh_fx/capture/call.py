"""One call of a model: its arguments, and the structure of its result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fomoh_fx.capture.leaks import has_tensors_behind
from fomoh_fx.capture.state import containers
from fomoh_fx.containers import children
from fomoh_fx.errors import CaptureError
from fomoh_fx.records import flattened

_PARTS = ("args", "kwargs", "targets")


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

    def has_shared(self, modules: Iterable[nn.Module]) -> bool:
        """Whether one list, dictionary or object is in two places of the arguments, or in one of these modules, too."""
        met = {id(container) for module in modules for _, container in containers(module)}
        todo: list[tuple[Any, int]] = [((self.args, self.kwargs, self.targets), 0)]
        while todo:
            value, depth = todo.pop()
            inside = children(value)
            if inside is None or depth > 8:
                continue
            if not isinstance(value, tuple):
                if id(value) in met:
                    return True
                met.add(id(value))
            todo += [(child, depth + 1) for child in inside.values()]
        return False

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
        for name in _PARTS:
            vars(self).pop(name, None)
        vars(self).update(zip(_PARTS, given, strict=False))


@dataclass
class Structure:
    """The pytree of the result: which leaves are tensors, and the other leaves."""

    spec: pytree.TreeSpec
    leaves: list[Any]  # an int for the number of a tensor output, or _Constant

    @classmethod
    def of(cls, result: Any) -> tuple[Structure, list[Tensor]]:
        """The structure of a result, and its tensors.

        Raises:
            CaptureError: one is in an object that is not taken apart.
        """
        leaves, spec = flattened(result)
        tensors: list[Tensor] = []
        places: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                places.append(len(tensors))
                tensors.append(leaf)
            elif has_tensors_behind(leaf):
                raise CaptureError(
                    f"model: returns a tensor inside a {type(leaf).__name__}, where no call can put its own; return it "
                    "in a tuple, a dictionary or a dataclass"
                )
            else:
                places.append(_Constant(leaf))
        return cls(spec, places), tensors

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
