"""Values that decide a branch or a shape, and that are known although they are in tensors.

Where nothing else could be captured, these count as constants: what PyTorch's factories make of Python numbers; the
buffers of the model, and tensors that a function refers to; at last whole numbers among the arguments (the edges of a
graph, the sample that each node belongs to). A graph holds for their values, and others are captured again. What the
model changes while it runs is no constant, but a flag that it sets (``if not self.initialized``) is known until then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree

from fomoh_fx.literals import KnownFactories, among_values, is_small, literal


def candidates(root: nn.Module, arguments: Sequence[Tensor], are_static: bool) -> Iterator[dict[str, Tensor]]:
    """What to take as constants, by name: whole numbers of the root, all of its buffers, and whole arguments too."""
    buffers = {name: buffer for name, buffer in root.named_buffers() if is_small(buffer)}
    yield {name: buffer for name, buffer in buffers.items() if _is_whole(buffer)}
    if not all(map(_is_whole, buffers.values())):
        yield buffers
    given = {argument(i): t for i, t in enumerate(arguments) if is_small(t) and _is_whole(t)}
    if given and are_static:
        yield {**buffers, **given}


def fewer(constants: Mapping[str, Tensor], used: Set[str]) -> Iterator[dict[str, Tensor]]:
    """Fewer constants that may do, for a graph is captured again where one is another: running statistics change.

    First without a buffer, then with the whole numbers that the model used, then with all that it used.
    """
    last = -1
    for is_kept in (lambda name: False, lambda name: name in used and _is_whole(constants[name]), used.__contains__):
        kept = {name: value for name, value in constants.items() if name.startswith(argument("")) or is_kept(name)}
        if len(kept) < len(constants) and len(kept) != last:
            yield kept
        last = len(kept)


def is_flag(name: str, x: Tensor) -> bool:
    """Whether a buffer is one number that says yes or no; one that counts would be another one at every call."""
    if name.startswith(argument("")):
        return False
    is_number = x.numel() == 1 and (x.dtype in (torch.bool, torch.uint8) or x.is_floating_point())
    return is_number and x.item() in (0, 1)


def argument(index: int | str) -> str:
    """The name of a tensor among the arguments; what they all begin with, for an empty index."""
    return f"argument {index}"


def _is_whole(x: Tensor) -> bool:
    return not x.is_floating_point()


#: These change the running statistics, and their versions do not tell.
KEEP_STATISTICS = {
    torch.nn.functional.batch_norm, torch.nn.functional.instance_norm, torch.batch_norm, torch.instance_norm,
    torch.native_batch_norm, torch.batch_norm_update_stats, torch.cudnn_batch_norm, torch.miopen_batch_norm,
}  # fmt: skip


class AsConstants(KnownFactories):
    """Puts constants, whose values a frontend knows, in the place of tensors while a model runs under it.

    Attributes:
        values: of the buffers and arguments that are constants; None where factories are to be left alone, too.
        flags: the names of those that stay what they are, inputs, while their values before are known.
        put: the constants by name, and their versions then.
        used: the names of those that the model gives to a function.
        changed: the names of those that the model changes.
    """

    def __init__(
        self, root: nn.Module, values: Mapping[str, Tensor] | None, flags: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        self.root, self.values, self.flags = root, values, flags
        self.changed: set[str] = set()
        self.used: set[str] = set()
        self.put: dict[str, tuple[Tensor, int]] = {}
        self._before: list[tuple[dict[str, Any], str, Any]] = []
        self._known: list[FakeTensor] = []

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The arguments, with constants in their places."""
        return [self._made(argument(i)) if argument(i) in (self.values or ()) else t for i, t in enumerate(tensors)]

    def _made(self, name: str) -> Tensor:
        assert self.values is not None
        constant = literal(self.values[name])
        self.put[name] = constant, constant._version
        return constant

    def _know(self, flag: Tensor, value: Tensor) -> None:
        """Let the fake tensor below know the value, until the model sets another one."""
        fake: Any = flag
        while isinstance(fake, FunctionalTensor):
            fake = torch._from_functional_tensor(fake.elem)
        if not isinstance(fake, FakeTensor):
            return
        with among_values():
            fake.constant = value.clone()
        fake.fake_mode.fake_tensor_converter.add_constant_storage_mapping(fake)
        self._known.append(fake)

    def __enter__(self) -> AsConstants:
        buffers = dict(self.root.named_buffers())
        with ExitStack() as undo:
            undo.callback(self._put_back)
            for name in self.flags:
                self._know(buffers[name], (self.values or {})[name])
            for name in [name for name in self.values or () if name in buffers and name not in self.flags]:
                parent, _, attribute = name.rpartition(".")
                owner = self.root.get_submodule(parent)._buffers
                self._before.append((owner, attribute, owner[attribute]))
                owner[attribute] = self._made(name)
            super().__enter__()
            undo.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._put_back()
        self.changed |= {name for name, (constant, version) in self.put.items() if constant._version != version}

    def _put_back(self) -> None:
        for owner, attribute, before in self._before:
            owner[attribute] = before
        for fake in self._known:
            fake.constant = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.put:
            given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
            names = {name for name, (constant, _) in self.put.items() if id(constant) in given}
            self.used |= names
            if func in KEEP_STATISTICS:
                self.changed |= names
        return func(*args, **kwargs) if self.values is None else super().__torch_function__(func, types, args, kwargs)
