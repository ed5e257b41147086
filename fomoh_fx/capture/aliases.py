"""Tensors that share memory with another one and not its derivative: ``x.detach()``, ``x.data``, views under no_grad.

A graph has no memory, so such an alias is a tensor of its own there. Where one of the two is changed in place, itself
or by any view of it, as their versions tell, the other one gets the value too; each keeps its own derivative.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fomoh_fx import operators  # noqa: F401  defines stop_gradient and with_value
from fomoh_fx.errors import UnsupportedOpError

ops = torch.ops.fomoh_fx

_WHAT = "an alias without derivative (x.detach(), x.data, or a view under no_grad)"
_ADVICE = (
    "a graph has no memory that they share; compute a new tensor instead (torch.where, index_copy), and change a "
    "buffer as a whole (buffer.copy_(...))"
)


def is_differentiable(x: Tensor) -> bool:
    """Whether tensors of its type have derivatives."""
    return x.is_floating_point() or x.is_complex()


def stopped(x: Tensor) -> Tensor:
    """A tensor of its own with the value, without derivative."""
    return ops.stop_gradient.default(x)


def is_view(x: Tensor) -> bool:
    """Whether it lies in another tensor's memory."""
    return _inner(x)._base is not None


def _inner(x: Tensor) -> Tensor:
    """What ``torch.vmap`` and its like wrap: that has the version, and is the view."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _behind(x: Tensor) -> Tensor:
    """The tensor that a view is one of."""
    return x if x._base is None else x._base


_UNKNOWN = -1


def _version(x: Tensor) -> int:
    return _inner(x)._version


@dataclass(eq=False)
class _Alias:
    """``tensor`` has the value of ``source``, a tensor or a view of one, with the versions and layouts of both."""

    ref: Callable[[], Tensor | None]
    source: Tensor
    versions: tuple[int, int]
    layouts: tuple[Any, Any]

    @property
    def tensor(self) -> Tensor | None:
        return self.ref()


class Aliases:
    """The aliases of one run that are alive.

    ``before_change`` is called with a source before it is changed.
    """

    def __init__(self, before_change: Callable[[Tensor], None]) -> None:
        self._before_change = before_change
        self._all: list[_Alias] = []

    def of(self, source: Tensor) -> Tensor:
        """A new alias; a tensor of whole numbers has no derivative, and its alias is a view."""
        if not is_differentiable(source):
            return torch.ops.aten.alias.default(source)
        tensor = stopped(source)
        if not source.is_inference():  # which has no version, and nobody may change it here
            versions, layouts = (_version(tensor), _version(source)), (_layout(tensor), _layout(source))
            is_wrapped = _inner(tensor) is not tensor  # then a view does not keep it alive
            ref = (lambda: tensor) if is_wrapped else weakref.ref(tensor)
            self._all.append(_Alias(ref, source, versions, layouts))
        return tensor

    def source(self, tensor: Tensor) -> Tensor | None:
        """What the tensor itself is an alias of."""
        return next((alias.source for alias in self._all if alias.tensor is tensor), None)

    def note(self, changed: Tensor) -> None:
        """The tensor was changed in place in a way that its version does not tell."""
        for alias in self._all:
            if _behind(alias.source) is _behind(changed):
                alias.versions = (alias.versions[0], _UNKNOWN)
            elif alias.tensor is _behind(changed):
                alias.versions = (_UNKNOWN, alias.versions[1])

    def follow(self) -> None:
        """Give the values of what was changed to its aliases and sources, and to theirs."""
        if self._all:
            self._all = [alias for alias in self._all if alias.tensor is not None]
            while any([self._follow(alias) for alias in self._all]):
                pass

    def leave(self, target: Tensor) -> list[Tensor]:
        """The target gets memory of its own. What shares the memory that it had is returned."""
        left = [alias for alias in self._all if alias.source is target or alias.source._base is target]
        own = [alias for alias in self._all if alias.tensor is target]
        self._all = [alias for alias in self._all if alias not in left and alias not in own]
        return [t for t in (*(a.tensor for a in left), *(a.source for a in own)) if t is not None]

    def clear(self) -> None:
        self._all.clear()

    def _follow(self, alias: _Alias) -> bool:
        """Whether one of the two was changed; then both have the new value."""
        if (tensor := alias.tensor) is None:
            return False
        versions = _version(tensor), _version(alias.source)
        if versions == alias.versions:
            return False
        is_changed, is_source_changed = (new != old for new, old in zip(versions, alias.versions, strict=True))
        if is_changed and is_source_changed:
            raise UnsupportedOpError(f"the model changes a tensor x and {_WHAT} in one call: {_ADVICE}")
        if alias.layouts != (_layout(tensor), _layout(alias.source)):
            raise UnsupportedOpError(f"the model changes the shape or strides of a tensor x or {_WHAT}: {_ADVICE}")
        if is_changed:
            _refuse_overlap(alias.source)
            self._before_change(alias.source)
            _give_value(alias.source, tensor)
        else:
            _give_value(tensor, alias.source)
        alias.versions = _version(tensor), _version(alias.source)
        return True


def _give_value(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(ops.with_value.default(target, value))


def _layout(x: Tensor) -> Any:
    return (x.shape, x.stride()) if x.layout == torch.strided else x.shape


def _refuse_overlap(x: Tensor) -> None:
    """In a view by ``unfold`` or ``as_strided`` one change is seen in several places."""
    sizes = (
        [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True)] if x.layout == torch.strided else []
    )
    if any(isinstance(n, torch.SymInt) for pair in sizes for n in pair):
        return
    extent = 0  # from the first element to the last one, along the dimensions so far
    for stride, size in sorted(sizes):
        if size > 1 and stride <= extent:
            raise UnsupportedOpError(f"the model changes {_WHAT} that has some elements several times: {_ADVICE}")
        extent += stride * (size - 1)
