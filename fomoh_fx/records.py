"""Objects of a user's with tensors in them, and dictionaries, lists and tuples of its own classes, as pytree nodes.

One that a call is given is taken apart, and one that it makes is made again by every call.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fomoh_fx.containers import attributes, has_tensors, is_record

_PLAIN = (bool, int, float, str, type(None))
_BASES: tuple[Any, ...] = (OrderedDict, defaultdict, dict, list, tuple)


@dataclass
class Record:
    """Stands for an object while it is flattened; unflattening gives another object like it.

    ``items`` is what is in one that is a dictionary, a list or a tuple; ``factory`` that of a defaultdict.
    """

    kind: type
    attributes: dict[str, Any]
    items: Any = None
    factory: Any = None


def opened(value: Any, is_leaf: Callable[[Any], bool] | None = None, within: frozenset[int] = frozenset()) -> Any:
    """The value with a Record for every object that has tensors; an object that has itself stays what it is."""

    def open_one(leaf: Any) -> Any:
        base = next((base for base in _BASES if isinstance(leaf, base)), None)
        if (is_leaf and is_leaf(leaf)) or not (base or is_record(leaf)) or id(leaf) in within or not has_tensors(leaf):
            return leaf
        inside = within | {id(leaf)}
        own = attributes(leaf) if hasattr(leaf, "__dict__") or base is None else {}
        items = None if base is None else dict(leaf) if issubclass(base, dict) else (list, tuple)[base is tuple](leaf)
        factory = leaf.default_factory if isinstance(leaf, defaultdict) else None
        parts = {name: opened(x, is_leaf, inside) for name, x in own.items()}
        return Record(type(leaf), parts, opened(items, is_leaf, inside), factory)

    return pytree.tree_map(open_one, value, is_leaf=is_leaf)


def flattened(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves, and the structure, of a value that is opened."""
    leaves, spec = pytree.tree_flatten(value)
    if all(isinstance(leaf, Tensor) or type(leaf) in _PLAIN for leaf in leaves):
        return leaves, spec
    return pytree.tree_flatten(opened(value))


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The value with something else for each of its tensors, in objects too."""
    leaves, spec = flattened(value)
    return pytree.tree_unflatten([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _parts(record: Record) -> tuple[list[Any], tuple[type, tuple[str, ...], Any]]:
    return [*record.attributes.values(), record.items], (record.kind, tuple(record.attributes), record.factory)


def _made(parts: Any, context: tuple[Any, tuple[str, ...], Any]) -> Any:
    (kind, names, factory), (*values, items) = context, parts
    made = tuple.__new__(kind, items) if isinstance(items, tuple) else kind.__new__(kind)
    for base in [base for base in _BASES if issubclass(kind, base)][:1]:
        if issubclass(base, dict):
            for key, item in items.items():
                base.__setitem__(made, key, item)
        elif base is list:
            list.extend(made, items)
    if isinstance(made, defaultdict):
        made.default_factory = factory
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made


def _named_parts(record: Record) -> tuple[list[tuple[Any, Any]], Any]:
    parts, context = _parts(record)
    names = (*record.attributes, "items")
    return [(pytree.GetAttrKey(name), part) for name, part in zip(names, parts, strict=True)], context


pytree.register_pytree_node(
    Record, _parts, _made, serialized_type_name="fomoh_fx.Record", flatten_with_keys_fn=_named_parts
)
