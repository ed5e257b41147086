"""What a model assigns to its attributes while it runs, and what it changes in the containers that are in them.

``self.mean = 0.9 * self.mean + 0.1 * y.mean()``, ``self.cache["h"] = h.detach()``, ``self.state = (h, c)``,
``self.recent.append(x)``: capture leaves the model as it was. The new tensors are outputs of the graph, and each call
assigns them, as the model itself would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from fomoh_fx.capture.assignment import Assignment, ChangedData, Lost, Same, fill, kept_elsewhere
from fomoh_fx.capture.in_place import Snapshot
from fomoh_fx.capture.leaks import has_tensors_behind
from fomoh_fx.capture.reading import are_equal, is_plain
from fomoh_fx.capture.state import STANDARD, Keys, containers, follow, written
from fomoh_fx.capture.where import at_attribute
from fomoh_fx.containers import children, has_tensors
from fomoh_fx.errors import CaptureError
from fomoh_fx.records import opened
from fomoh_fx.sizes import SYMBOLIC

_MISSING = object()
_ORDER = ("order",)  # stands for a key
_NUMBERS = (int, float)
_FLAGS = (bool, str, type(None))
#: What the root calls the arguments of the call: they are others at every call, which takes what a run puts there.
_GIVEN = "given"
#: Where a module has the hooks of its forward: a model may install some at its first call, and note that it has.
_HOOKS = tuple(name for name in vars(nn.Module()) if name.startswith("_forward_"))


@dataclass
class _Watched:
    path: str | None
    keys: Keys  # of a container; () for the attributes of the module
    module: nn.Module
    holder: Any
    before: Any
    value: Any = None  # the container itself, of which the holder may be the attributes


class Assignments:
    """While it is entered, the attributes of modules are watched, and their containers; in the end each is what it was.

    Attributes:
        made: what was assigned.
        numbers: numbers that were changed in containers, and sizes of dynamic dimensions that were kept.
        same: for a tensor from before the run, or what stands for it meanwhile, what it is.
    """

    def __init__(self, root: nn.Module) -> None:
        self.made: list[Assignment] = []
        self.numbers: list[ChangedData] = []
        self.same: Callable[[Tensor], Same | None] = lambda tensor: None
        self._watched: list[_Watched] = []
        self._tables: list[tuple[nn.Module, str, dict[str, Any], dict[str, Any]]] = []
        self._containers: set[int] = set()
        self._snapshots: list[tuple[_Watched, Any, Snapshot]] = []  # with their keys, of what is no container
        self._transient: dict[nn.Module, set[str]] = {}  # the buffers that are no part of the state
        self._hooks = [
            (hooks, len(hooks)) for m in root.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)
        ]
        for path, module in root.named_modules():
            self.watch(module, path)

    def watch(self, module: nn.Module, path: str | None = None) -> None:
        """Watch a module; without a path, only to put its attributes back.

        It may be met inside ``torch.func.functional_call``, which puts back itself what it has exchanged.
        """
        if path is None and any(map(_stands_in, (*module.parameters(False), *module.buffers(False)))):
            return
        for what, table in (("parameter", module._parameters), ("module", module._modules)):
            self._tables.append((module, what, table, dict(table)))
        self._transient[module] = {*module._non_persistent_buffers_set}
        holder: Any
        for holder in (vars(module), module._buffers):
            self._watched.append(_Watched(path, (), module, holder, dict(holder)))
        for name in _HOOKS:
            hooks = vars(module)[name]
            self._watched.append(_Watched(path, (name,), module, hooks, dict(hooks), hooks))
        if path == "":  # the root's own are the call's
            return
        self._take_snapshots(self._watched[-2 - len(_HOOKS)])
        for keys, value in containers(module):
            self._containers.add(id(value))
            if isinstance(value, (list, deque)):
                watched = _Watched(path, keys, module, value, list(value), value)
            else:
                holder = children(value)
                watched = _Watched(path, keys, module, holder, dict(holder or {}), value)
            if not isinstance(value, tuple):
                self._watched.append(watched)
            self._take_snapshots(watched)

    def _take_snapshots(self, watched: _Watched) -> None:
        """Of what may change in place in a container, or in the attributes of a module."""
        inside = enumerate(watched.before) if isinstance(watched.before, list) else watched.before.items()
        for key, value in inside:
            if (watched.keys or key not in STANDARD) and (snapshot := Snapshot.of(value)) is not None:
                self._snapshots.append((watched, key, snapshot))

    def __enter__(self) -> Assignments:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        there = [not watched.keys or _is_there(watched) for watched in self._watched]
        self._refusal: CaptureError | None = None
        self._changes_in_place()
        for watched, is_there in zip(self._watched, there, strict=True):
            noted, refusal = len(self.numbers), self._refusal
            made = self._changes(watched)  # which puts back what was before
            if is_there and watched.path is not None:
                self.made += made
            if not is_there:  # the container is another one now, which is assigned
                del self.numbers[noted:]
                self._refusal = refusal
        for module, names in self._transient.items():
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(names)
        for module, what, table, before in self._tables:
            others = [name for name in {**before, **table} if table.get(name) is not before.get(name)]
            if _put_back(table, before) and others:
                self._refuse(
                    f"assigns another {'tensor to a parameter' if what == 'parameter' else 'submodule'} of its "
                    f"{type(module).__name__} while it runs; "
                    + ("compute with the new tensor under another name" if what == "parameter" else "make it before"),
                    _Watched(None, (others[0],), module, table, before),
                )
        if self._refusal is not None and kind is None:
            raise self._refusal

    def _refuse(self, why: str, watched: _Watched | None = None) -> None:
        """In the end, when everything is as it was; the first reason counts."""
        where = at_attribute(type(watched.module), watched.keys[0]) if watched is not None and watched.keys else ""
        self._refusal = self._refusal or CaptureError(f"model: {why}{where}")

    def _changes_in_place(self) -> None:
        """Of what is no container, and then as it was."""
        for watched, key, snapshot in [found for found in self._snapshots if found[2].has_changed()]:
            after, has_tensors = snapshot.now(), snapshot.has_tensors()
            is_there = _at(watched.holder, key) is snapshot.value and (not watched.keys or _is_there(watched))
            snapshot.put(snapshot.before)
            if has_tensors:
                self._refusal = self._refusal or kept_elsewhere(f"a {type(snapshot.value).__name__}")
            if is_there and watched.path == _GIVEN:
                self._refuse_change_of_argument(type(snapshot.value).__name__)
            elif is_there and watched.path is not None:
                self.numbers.append(self._change(watched, key, snapshot.put, snapshot.before, after))

    def _changes(self, watched: _Watched) -> list[Assignment]:
        """What was assigned in a holder, which is then as it was."""
        if isinstance(watched.holder, (list, deque)):
            return self._changes_of_list(watched)
        path, keys, holder, before = watched.path, watched.keys, watched.holder, watched.before
        found, now = [], [*holder]
        for key in [*before, *(k for k in holder if k not in before)]:
            old, new = before.get(key, _MISSING), holder.get(key, _MISSING)
            if new is old or (not keys and key in STANDARD):
                continue
            if path == _GIVEN:
                found.append(self._change_of_argument(watched, key, old, new))
                continue
            if symbols := symbolic(new):
                _restore(holder, key, old)
                self._note_sizes(watched, key, partial(_restore, holder, key), old, new, symbols)
                continue
            if type(old) in _NUMBERS and type(new) in _NUMBERS:
                self._note_numbers(watched, key, partial(holder.__setitem__, key), old, new)
                continue
            if isinstance(new, RemovableHandle):  # of a hook, which is assigned itself
                self.numbers.append(self._change(watched, key, partial(_restore, holder, key), old, new))
                _restore(holder, key, old)
                continue
            if not keys and not (has_tensors(new) or has_tensors(old) or is_plain(old if new is _MISSING else new)):
                after = Lost(type(new)) if has_tensors_behind(new) else new
                change = self._change(watched, key, partial(_restore, holder, key), old, after)
                self.numbers.append(replace(change, is_opaque=True))
                _restore(holder, key, old)
                continue
            _restore(holder, key, old)
            if _is_settled(old, new) and not self.watches(old):  # what is in a container may have changed
                continue
            if new is _MISSING:
                found.append(Assignment(path, (*keys, key), "delete"))
            else:
                made = self._taken_out(path, (*keys, key), "set", new, old is _MISSING)
                found.append(replace(made, registers=self._registers(watched, key, old)))
        if keys and isinstance(holder, dict):
            self._note_order(watched, now)
        return found

    def _change_of_argument(self, watched: _Watched, key: Any, old: Any, new: Any) -> Assignment:
        """Of a dictionary or an object."""
        _restore(watched.holder, key, old)
        if symbolic(new):
            self._refuse_change_of_argument("size of a dynamic dimension")
        keys = (*watched.keys, key)
        if new is _MISSING:
            return Assignment(watched.path, keys, "delete")
        return self._taken_out(watched.path, keys, "set", new, old is _MISSING)

    def _refuse_change_of_argument(self, what: str) -> None:
        self._refuse(
            f"leaves a {what} that it changes among its arguments, and a graph has no place for it there; return it"
        )

    def _note_order(self, watched: _Watched, now: Sequence[Any]) -> None:
        """A model may go by the order of keys, as a cache that drops the least recently used."""
        place = {key: i for i, key in enumerate(watched.before)}  # keys may be tensors, which are not to be compared
        if [place.get(key) for key in watched.holder] != [*place.values()]:
            _reorder(watched.holder, [*place])
        kept = [place[key] for key in now if key in place]
        if kept == sorted(kept):
            return
        if watched.path == _GIVEN:
            self._refuse_change_of_argument("dictionary with another order of its keys")
        else:
            put = partial(_reorder, watched.holder)
            self.numbers.append(self._change(watched, _ORDER, put, [*place], [*now]))

    def _registers(self, watched: _Watched, name: str, old: Any) -> bool | None:
        """Whether the buffer of this name is persistent, where the run has registered it."""
        module = watched.module
        if watched.holder is not module._buffers:
            return None
        is_transient = name in module._non_persistent_buffers_set
        return not is_transient if old is _MISSING or is_transient != (name in self._transient[module]) else None

    def _changes_of_list(self, watched: _Watched) -> list[Assignment]:
        now, before = list(watched.holder), watched.before
        if _are_same(now, before):
            return []
        if watched.path == _GIVEN:
            fill(watched.holder, before)
            if symbolic(now):
                self._refuse_change_of_argument("size of a dynamic dimension")
            return [self._taken_out(watched.path, watched.keys, "contents", now, False)]
        if symbols := symbolic(now):
            fill(watched.holder, before)
            self._note_sizes(watched, None, partial(fill, watched.holder), before, now, symbols)
            return []
        if not has_tensors(now) and not has_tensors(before):
            self._note_numbers(watched, None, partial(fill, watched.holder), before, now)
            return []
        fill(watched.holder, before)
        is_longer = len(now) > len(before) > 0 and _are_same(now[: len(before)], before)
        if is_longer and getattr(watched.holder, "maxlen", None) is None:
            self._refuse(
                f"its {type(watched.module).__name__}.{written(watched.keys)} grows by tensors at every call, so every "
                "call would need another graph. Clear it at the start of forward, or keep the tensors in a buffer or "
                "in a collections.deque with a maxlen",
                watched,
            )
        return [self._taken_out(watched.path, watched.keys, "contents", now, False)]

    def _note_sizes(
        self, watched: _Watched, key: Any, put: Callable[[Any], None], before: Any, after: Any, symbols: Sequence[Any]
    ) -> None:
        """A size of a dynamic dimension is another one in other calls; one that only the data decide no graph has."""
        change = self._change(watched, key, put, before, after)
        if any(map(free_unbacked_symbols, symbols)):
            self._refuse(
                f"keeps a number that only the data decide (.item()) in its {change.name}, and a graph has no numbers; "
                "keep the tensor (.detach()) instead, which every call assigns",
                replace(watched, keys=(*watched.keys, key)),
            )
            return
        example = pytree.tree_map_only(SYMBOLIC, lambda size: size.node.hint + 1, after)
        self.numbers.append(replace(change, after=example, size=after))

    def _note_numbers(self, watched: _Watched, key: Any, put: Callable[[Any], None], before: Any, after: Any) -> None:
        if not are_equal(before, after):  # 1 and 1.0 are not
            self.numbers.append(self._change(watched, key, put, before, after))
        put(before)

    def _change(self, watched: _Watched, key: Any, put: Callable[[Any], None], before: Any, after: Any) -> ChangedData:
        keys = watched.keys if key is None or key is _ORDER else (*watched.keys, key)
        name = f"{type(watched.module).__name__}.{written(keys)}"
        attribute = type(watched.module), str(keys[0])
        return ChangedData((id(watched.holder), key), name, put, before, after, attribute=attribute)

    def _taken_out(self, path: str | None, keys: Keys, kind: Any, value: Any, is_new: bool) -> Assignment:
        values, spec = self._flat(value)
        leaves = [self.same(leaf) if isinstance(leaf, Tensor) else (leaf,) for leaf in values]
        tensors = [value for value, leaf in zip(values, leaves, strict=True) if leaf is None]
        return Assignment(path, keys, kind, leaves, spec, tensors, is_new=is_new)

    def _flat(self, value: Any) -> tuple[list[Any], Any]:
        """The leaves and their structure; containers that are watched themselves are leaves."""

        def is_leaf(x: Any) -> bool:
            return isinstance(x, torch.Size) or (x is not value and self.watches(x))

        return pytree.tree_flatten(opened(value, is_leaf), is_leaf=is_leaf)

    def watches(self, value: Any) -> bool:
        """Whether it is a container from before the run, and what is in it is watched."""
        return id(value) in self._containers

    def is_as_before(self, made: Assignment, module: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
        """Whether what is assigned is there already: the weights that an LSTM lists, after ``self.x += 1``, too.

        ``tensors`` are those from before the run, by their names.
        """
        try:
            before, spec = self._flat(follow(module, made.keys))
        except (AttributeError, LookupError):
            return False
        if made.kind == "delete" or spec != made.spec:
            return False
        return all(_is_one(leaf, value, tensors) for leaf, value in zip(made.leaves, before, strict=True))


def _is_one(leaf: Any, before: Any, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a leaf of what is assigned is the value from before."""
    if leaf is None:
        return False
    if isinstance(leaf, Same):
        return not leaf.is_detached and tensors.get(leaf.name, _MISSING) is before
    return leaf[0] is before or (type(leaf[0]) is type(before) in (*_NUMBERS, *_FLAGS) and leaf[0] == before)


def _is_settled(old: Any, new: Any) -> bool:
    """Whether two values without tensors are equal."""
    if old is _MISSING or new is _MISSING or has_tensors(old) or has_tensors(new):  # which are not to be asked anything
        return False
    return is_plain(old) and is_plain(new) and are_equal(old, new)


def _stands_in(tensor: Tensor) -> bool:
    """Whether it is a frontend's or a function transform's, in place of a tensor with data."""
    return isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def symbolic(value: Any) -> list[Any]:
    """The numbers in a value that stand for a size, or for what only the data decide."""
    leaves = pytree.tree_leaves(opened(value))
    return [leaf for leaf in leaves if isinstance(leaf, SYMBOLIC)]


def _restore(holder: Any, key: Any, old: Any) -> None:
    if old is _MISSING:
        holder.pop(key, None)
    else:
        holder[key] = old


def _put_back(table: dict[str, Any], before: dict[str, Any]) -> bool:
    """Let a table have what it had; whether it had changed."""
    if _are_same([*table], [*before]) and _are_same([*table.values()], [*before.values()]):
        return False
    table.clear()
    table.update(before)
    return True


def _is_there(watched: _Watched) -> bool:
    """Whether the container is still where it was."""
    try:
        return follow(watched.module, watched.keys) is watched.value
    except (AttributeError, LookupError):
        return False


def _reorder(holder: dict[Any, Any], order: Sequence[Any]) -> None:
    """Let the keys of a dictionary be in this order, others after them."""
    kept = dict(holder)
    holder.clear()
    holder.update({key: kept.pop(key) for key in order if key in kept} | kept)


def _at(holder: Any, key: Any) -> Any:
    """What is at the key, None for nothing."""
    try:
        return holder[key]
    except LookupError:
        return None


def _are_same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
