"""Which dimensions of the arguments are dynamic: not part of the signature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.export import Dim

from fomoh_fx.capture import Call
from fomoh_fx.errors import ArgumentError
from fomoh_fx.records import flattened
from fomoh_fx.seeds import positional_names

Dims = dict[int, Any]
HINT = type(Dim.AUTO)
#: The attributes of tensors by which ``torch._dynamo`` marks dimensions, and what a mark means.
MARKS = {"_dynamo_weak_dynamic_indices": Dim.AUTO, "_dynamo_dynamic_indices": Dim.DYNAMIC}


def dynamic_dims(model: Any, call: Call, dynamic_shapes: Any) -> list[Dims] | None:
    """For every tensor leaf of the call its dynamic dimensions, or None where everything is static.

    Args:
        model: whose ``forward`` names the positional arguments.
        call: the arguments.
        dynamic_shapes: as in ``torch.export``, a mapping from argument names (and ``"targets"``, a tuple) or a sequence
            in the order of the arguments, with ``{dimension: Dim}``, a tuple of one entry for each dimension, or
            None in place of each tensor. Dimensions marked by ``torch._dynamo.mark_dynamic`` are added.

    Raises:
        ArgumentError: the structure of ``dynamic_shapes`` is not the arguments' own, or an entry is no dimension.
    """
    if dynamic_shapes is None and not any(hasattr(t, mark) for t in call.tensors for mark in MARKS):
        return None
    names = positional_names(model, len(call.args))
    arguments = {**dict(zip(names, call.args, strict=True)), **call.kwargs, "targets": call.targets}
    given = _by_name(dynamic_shapes, list(arguments), len(names))
    found: list[Dims] = []
    for name, value in arguments.items():
        leaves, spec = flattened(value)
        entry = given.get(name)
        try:
            parts = [None] * len(leaves) if entry is None else spec.flatten_up_to(_as(type(value), entry))
        except ValueError as error:
            raise ArgumentError(f"dynamic_shapes: for argument {name!r}: {error}") from error
        found += [_dims(name, leaf, part) for leaf, part in zip(leaves, parts, strict=True) if isinstance(leaf, Tensor)]
    return found if any(found) else None


def must_vary(dim: Any) -> bool:
    """Whether it is an error if the model or a rule fixes the dimension: not for ``Dim.AUTO``."""
    return not (isinstance(dim, HINT) and dim.type is Dim.AUTO.type)


def has_range_of(dim: Any, other: Any) -> bool:
    """Whether a dimension that is traced as ``dim`` takes every size that ``other`` names; hints name none."""
    if not (isinstance(dim, Dim) and isinstance(other, Dim)):
        return True
    return dim.min <= other.min and other.max <= dim.max


def _by_name(dynamic_shapes: Any, names: list[str], positional: int) -> dict[str, Any]:
    """The entries by the names of the arguments, checked."""
    if dynamic_shapes is None:
        return {}
    if isinstance(dynamic_shapes, Mapping):
        unknown = [name for name in dynamic_shapes if name not in names]
        if unknown:
            raise ArgumentError(
                f"dynamic_shapes: the call has no argument {unknown[0]!r}; there are {', '.join(names)}"
            )
        return dict(dynamic_shapes)
    if not isinstance(dynamic_shapes, (tuple, list)):
        raise ArgumentError(
            "dynamic_shapes: expected a mapping from argument names or a sequence in the order of the arguments, "
            f"got {type(dynamic_shapes).__name__}"
        )
    if not positional <= len(dynamic_shapes) <= len(names):
        raise ArgumentError(
            f"dynamic_shapes: {len(dynamic_shapes)} entries for {positional} positional arguments; "
            f"in order they are {', '.join(names)}"
        )
    return dict(zip(names, dynamic_shapes, strict=False))


def _as(kind: type, entry: Any) -> Any:
    """A tuple and a list of entries mean the same."""
    return kind(entry) if kind in (tuple, list) and isinstance(entry, (tuple, list)) else entry


def _dims(name: str, tensor: Tensor, part: Any) -> Dims:
    """The dynamic dimensions of one tensor: its entry's, and those that Dynamo's marks name, but for sizes 0 and 1."""
    if part is not None and not isinstance(part, (Mapping, tuple, list)):
        raise ArgumentError(
            f"dynamic_shapes: for argument {name!r}: expected {{dimension: Dim}}, a tuple of one entry for each "
            f"dimension, or None in place of a tensor, got {part!r}"
        )
    if isinstance(part, (tuple, list)) and len(part) != tensor.ndim:
        raise ArgumentError(
            f"dynamic_shapes: for argument {name!r}: {len(part)} entries for a tensor of {tensor.ndim} dimensions"
        )
    marks = ((dim, kind) for mark, kind in MARKS.items() for dim in getattr(tensor, mark, ()))
    marked: Dims = {dim: kind for dim, kind in marks if tensor.shape[dim] > 1}  # those are captured on their own
    entries = part if isinstance(part, Mapping) else dict(enumerate(part or ()))
    given = {dim: value for dim, value in entries.items() if _is_dynamic(name, tensor, dim, value)}
    return {**marked, **given}


def _is_dynamic(name: str, tensor: Tensor, dim: Any, value: Any) -> bool:
    """Whether an entry makes its dimension dynamic: None, ``Dim.STATIC`` and its own size do not."""
    if not isinstance(dim, int) or not 0 <= dim < tensor.ndim:
        raise ArgumentError(
            f"dynamic_shapes: for argument {name!r}: a tensor of {tensor.ndim} dimensions has no dimension {dim!r}"
        )
    if value is None or (isinstance(value, HINT) and value.type is Dim.STATIC.type):
        return False
    if isinstance(value, (Dim, HINT)):
        return True
    if value == tensor.shape[dim] and isinstance(value, int):
        return False
    raise ArgumentError(
        f"dynamic_shapes: for argument {name!r}: dimension {dim} has size {tensor.shape[dim]}; expected a "
        f"torch.export.Dim, Dim.AUTO, Dim.DYNAMIC, Dim.STATIC, this size or None, got {value!r}"
    )
