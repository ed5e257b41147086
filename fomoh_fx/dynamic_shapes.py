"""Which dimensions of the arguments are dynamic: not part of the signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.export import Dim
from torch.utils import _pytree as pytree

from fomoh_fx.capture import Call
from fomoh_fx.errors import ArgumentError

Dims = dict[int, Any]


def dynamic_dims(call: Call, names: Sequence[str], dynamic_shapes: Any) -> list[Dims] | None:
    """For every tensor leaf of the call its dynamic dimensions, or None where everything is static.

    Args:
        call: the arguments.
        names: the names of the positional arguments.
        dynamic_shapes: as in ``torch.export``, a mapping from argument names (and ``"targets"``, a tuple) or a sequence
            in the order of the arguments, with ``{dimension: Dim}``, a tuple of one entry for each dimension, or
            None in place of each tensor. Dimensions marked by ``torch._dynamo.mark_dynamic`` are added.

    Raises:
        ArgumentError: the structure of ``dynamic_shapes`` is not the arguments' own.
    """
    arguments = {**dict(zip(names, call.args, strict=True)), **call.kwargs, "targets": call.targets}
    if dynamic_shapes is None:
        given: dict[str, Any] = {}
    elif isinstance(dynamic_shapes, Mapping):
        given = dict(dynamic_shapes)
    else:
        given = dict(zip(arguments, dynamic_shapes, strict=False))
    unknown = [name for name in given if name not in arguments]
    if unknown:
        raise ArgumentError(
            f"dynamic_shapes: the call has no argument {unknown[0]!r}; there are {', '.join(arguments)}"
        )
    found: list[Dims] = []
    for name, value in arguments.items():
        leaves, spec = pytree.tree_flatten(value)
        try:
            parts = [None] * len(leaves) if given.get(name) is None else spec.flatten_up_to(given[name])
        except ValueError as error:
            raise ArgumentError(f"dynamic_shapes: for argument {name!r}: {error}") from error
        found += [_dims(leaf, part) for leaf, part in zip(leaves, parts, strict=True) if isinstance(leaf, Tensor)]
    return found if any(found) else None


def _dims(tensor: Tensor, part: Any) -> Dims:
    entries = part if isinstance(part, Mapping) else dict(enumerate(part or ()))
    marked: dict[int, Any] = dict.fromkeys(getattr(tensor, "_dynamo_dynamic_indices", ()), Dim.AUTO)
    return {**marked, **{d: dim for d, dim in entries.items() if dim is not None}}
