"""Objects of a user's as pytree nodes, so that one with tensors, which a call makes, is made again by every call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

from fomoh_fx.capture.state import attributes, has_tensors, is_record


@dataclass
class Record:
    """Stands for an object of this type while it is flattened; unflattening gives another object like it."""

    kind: type
    attributes: dict[str, Any]


def _flatten(record: Record) -> tuple[list[Any], tuple[type, tuple[str, ...]]]:
    return [*record.attributes.values()], (record.kind, tuple(record.attributes))


def _made(values: Any, context: tuple[type, tuple[str, ...]]) -> Any:
    kind, names = context
    made = kind.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made


pytree.register_pytree_node(Record, _flatten, _made, serialized_type_name="fomoh_fx.Record")


def opened(value: Any, is_leaf: Callable[[Any], bool], within: frozenset[int] = frozenset()) -> Any:
    """The value with a Record for every object that has tensors; an object that has itself stays what it is."""

    def open_one(leaf: Any) -> Any:
        if is_leaf(leaf) or id(leaf) in within or not is_record(leaf) or not has_tensors(leaf):
            return leaf
        inside = within | {id(leaf)}
        return Record(type(leaf), {name: opened(x, is_leaf, inside) for name, x in attributes(leaf).items()})

    return pytree.tree_map(open_one, value, is_leaf=is_leaf)
