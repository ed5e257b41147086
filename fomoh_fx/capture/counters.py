"""Numbers among a model's attributes, and in containers there, that a call changes.

A graph has an attribute as a constant. What a call changes, such as the largest length that a cache was made for, it
assigns, and the next call, which finds another value, has a graph of its own. Numbers that every call changes are
refused if the graph depends on them, unless they take a few values by turns. If it does not, those to which every call
adds the same (``self.step += 1``) are counted, and do not need another graph. Which of them these are is found by
capturing again as the second call and some later ones would find the model; that the model does something at one call
alone, ``if self.step == 100``, is not found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fomoh_fx.capture.assignment import ChangedData, Lost, kept_elsewhere
from fomoh_fx.capture.assignments import Assignments
from fomoh_fx.capture.call import Call
from fomoh_fx.capture.draws import same_graph
from fomoh_fx.capture.program import Program
from fomoh_fx.capture.reading import COUNTED, are_equal
from fomoh_fx.capture.root import Root
from fomoh_fx.capture.where import at_attribute
from fomoh_fx.errors import CaptureError, FomohError
from fomoh_fx.passes.retrace import without_autocast
from fomoh_fx.sizes import SYMBOLIC

Changes = dict[Any, ChangedData]
_NUMBERS = (int, float)
_FEW = 9  # values that data may take by turns
#: Numbers at which a count is looked at again: a model may depend on it only from some call on, or at every n-th.
_LATE, _ROUND = 10**6 + 3, 2**10 * 3**3 * 5**6 * 7 * 11 * 13


def refuse_counted(capture: Callable[[], Program], model: Any, loss: Any, call: Call) -> Program:
    """What is captured, if it does not depend on numbers that every call changes.

    Raises:
        CaptureError: the second call would have another graph, and the third one too.
    """
    program, first = _observed(capture)
    root = Root(model, loss, call, outside=program.outside)
    if first:
        _look_again(program, first, capture, root)
    program.read = {id(module): _plain_attributes(module) for module in root.modules() if module is not root}
    return program


def _look_again(program: Program, first: Changes, capture: Callable[[], Program], root: Root) -> None:
    """Whether the graph depends on what was changed, and what becomes of that."""
    counted: list[ChangedData] = []
    seen: list[dict[Any, ChangedData]] = []
    depends = False
    opaque = [change for change in first.values() if change.is_opaque]
    with _after_a_call(program, first.values(), root):
        try:
            same = _observed(capture)[0] if program.assignments else program  # but for the numbers
            _put(first.values(), [change.after for change in first.values()])
            again, second = _observed(capture)
        except FomohError:  # which the second call will raise
            second = {}
        else:
            seen.append(second)
            counted = [change for key, change in first.items() if key in second]
            depends = bool(counted) and not same_graph(same, again)
            if depends and any(change.is_opaque for change in counted):  # it may be something else
                _put(opaque, [change.before for change in opaque])
                if same_graph(_observed(capture)[0], again):
                    counted = [change for change in counted if not change.is_opaque]
                    depends = bool(counted)
                _put(opaque, [change.after for change in opaque])
        lost = [change for change in opaque if isinstance(change.after, Lost)]
        for change in lost:
            if change.after.was_used:
                raise kept_elsewhere(f"{change.name}, an object of type {change.after.kind.__name__}")
        numbers = [change for change in counted if type(change.before) in _NUMBERS]
        for later in zip(*map(_later, numbers), strict=True):
            if not depends:
                _put(numbers, later)
                again, changes = _observed(capture)
                seen.append(changes)
                depends = not same_graph(same, again)
        takes_few = depends and _take_few(counted, second, capture)
        sizes = [change for change in first.values() if _is_the_same_size(change, second)]
        is_overwritten = bool(sizes) and not depends and _is_same_after(sizes, same, capture)
    if depends and not takes_few:
        names = " and ".join(change.name for change in counted)
        where = next((line for change in counted if (line := at_attribute(*change.attribute))), "")
        raise CaptureError(
            f"model: changes {names} at every call, and computes with it or returns it, so the graph would "
            f"have its first value for ever. Keep it as a tensor in a buffer, or pass it as an argument{where}"
        )
    _assign(program, first, second, [] if takes_few else seen, root)
    if is_overwritten:
        modules = {id(vars(module)): module for module in root.modules() if module is not root}
        attributes = [(modules[c.key[0]], c.key[1]) for c in sizes if c in program.settled and c.key[0] in modules]
        program.overwritten = [(m, name) for m, name in attributes if _is_simple(getattr(m, name, None))]
        for module, name in program.overwritten:
            COUNTED.setdefault(module, set()).add(name)


def _take_few(counted: Sequence[ChangedData], second: Changes, capture: Callable[[], Program]) -> bool:
    """Whether what the second call changes, too, takes a few values over and over, or one in the end.

    Every call then assigns what the model does, and there is a graph for each: ``self.turn = (self.turn + 1) % 4``.
    """
    if any(change.is_opaque or change.is_size for change in counted):
        return False
    met = [[change.before for change in counted]]
    now, changes = [change.after for change in counted], second
    while len(met) < _FEW:
        if any(are_equal(now, values) for values in met):
            return True
        met.append(now)
        now = [changes[c.key].after if c.key in changes else value for c, value in zip(counted, now, strict=True)]
        _put(counted, now)
        try:
            changes = _observed(capture)[1]
        except FomohError:
            return False
    return False


def _assign(program: Program, first: Changes, second: Changes, seen: Sequence[Changes], root: Root) -> None:
    """Let every call of the program change what the model changes; one that counts up leaves the graph as it is.

    Args:
        program: the first call's.
        first, second: what these calls change.
        seen: what calls with other numbers change, if none of them matters.
        root: whose modules it is about.
    """
    modules = {id(vars(module)): module for module in root.modules() if module is not root}
    counts, settled = [], []
    for (holder, name), change in first.items():
        if isinstance(change.after, Lost) or (change.is_opaque and change.key in second):
            continue  # no call reads what another one has written
        step = _step(change)
        if seen and holder in modules and step is not None and all(_is_counted(change, c) for c in seen):
            counts.append((modules[holder], name, change.size - change.before if change.is_size else step))
            COUNTED.setdefault(modules[holder], set()).add(name)
        elif change.is_size and not _is_the_same_size(change, second):
            raise CaptureError(
                f"model: keeps the size of a dynamic dimension in {change.name}, where later calls find it. Leave that "
                "dimension static, or pass the number as an argument"
            )
        else:
            settled.append(change)
    program.counts, program.settled = counts, settled


def _is_same_after(sizes: Sequence[ChangedData], program: Program, capture: Callable[[], Program]) -> bool:
    """Whether a call of the sizes that the one before has kept has the same graph: some models then keep a cache."""
    _put(sizes, [pytree.tree_map_only(SYMBOLIC, lambda size: size.node.hint, change.size) for change in sizes])
    try:
        return same_graph(program, _observed(capture)[0])
    except FomohError:
        return False


def _is_the_same_size(change: ChangedData, others: Changes) -> bool:
    """Whether another run has kept the same size in its place, whatever was there."""
    if not change.is_size or change.key not in others:
        return False
    ours, form = pytree.tree_flatten(change.size)
    theirs, their_form = pytree.tree_flatten(others[change.key].size)

    def plain(leaf: Any) -> Any:
        return (type(leaf), str(leaf.node.expr)) if isinstance(leaf, SYMBOLIC) else leaf

    return form == their_form and are_equal([*map(plain, ours)], [*map(plain, theirs)])


def _step(change: ChangedData) -> float | None:
    """What is added to a number."""
    return change.after - change.before if type(change.before) in _NUMBERS and type(change.after) in _NUMBERS else None


def _is_counted(change: ChangedData, others: Changes) -> bool:
    """Whether another run adds the same."""
    return change.key in others and _step(others[change.key]) == _step(change)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What some graph may count up or overwrite and this one depend on."""
    return {name: value for name, value in vars(module).items() if _is_simple(value)}


def _is_simple(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return all(type(part) in (*_NUMBERS, bool, str, type(None)) for part in parts)


@contextmanager
def _after_a_call(program: Program, changes: Iterable[ChangedData], root: Root) -> Iterator[None]:
    """The model as a call of the program leaves it, but for its numbers; in the end all of it is as it was."""
    try:
        with Assignments(root):
            program.assign(_assigned_values(program, root.call.tensors), root.call.tensors)
            yield
    finally:
        _undo(changes)


def _put(changes: Iterable[ChangedData], numbers: Iterable[Any]) -> None:
    for change, number in zip(changes, numbers, strict=True):
        change.put(number)


def _assigned_values(program: Program, arguments: Sequence[Tensor]) -> list[Tensor]:
    """What the model computes for its attributes."""
    if not any(what.kind == "assignment" for what in program.outputs):
        return []
    inputs = [what.value(arguments) for what in program.inputs]
    with torch.no_grad(), without_autocast(), torch.random.fork_rng():
        values = program.module(*inputs)
    return [value for value, what in zip(values, program.outputs, strict=True) if what.kind == "assignment"]


def _later(change: ChangedData) -> tuple[Any, ...]:
    """What the number may be at other calls, before they change it."""
    step = change.after - change.before
    far = _ROUND if step > 0 else -_ROUND
    return change.before + _LATE * step, far - step, far


def _observed(capture: Callable[[], Program]) -> tuple[Program, Changes]:
    """What is captured, and the numbers that were changed meanwhile, which are as they were."""
    program = capture()
    return program, {change.key: change for change in program.numbers}


def _undo(changes: Iterable[ChangedData]) -> None:
    for change in changes:
        change.put(change.before)
