"""Operators of other libraries that change their arguments, as functional ones.

``mylib::scale(Tensor(a!) x, float s) -> ()`` becomes ``mylib__scale(Tensor x, float s) -> Tensor``: what the operator
returns, then the new value of each argument that it changes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import Function
from torch.utils import _pytree as pytree

from fomoh_fx.custom_functions import apply_function
from fomoh_fx.errors import UnsupportedOpError

library = torch.library.Library("fomoh_fx_functional", "DEF")

CHANGING: dict[Any, OpOverload] = {}  # by functional form
_FORMS: dict[OpOverload, OpOverload] = {}
#: The libraries of which PyTorch itself knows the functional forms.
_NATIVE = {"aten", "prim", "prims", "quantized", "_c10d_functional", "inductor"}
_ALIAS = re.compile(r"\([a-z0-9]+!?(?: -> [^)]*)?\)(?=\W)")


def changes_arguments(op: Any) -> bool:
    """Whether this is an operator of another library that changes tensors, or lists of tensors, among its arguments."""
    if not isinstance(op, OpOverload) or op.namespace in _NATIVE or not op._schema.is_mutable:
        return False
    return all(str(argument.type) in ("Tensor", "List[Tensor]") for argument in changed_arguments(op))


def changed_arguments(op: OpOverload) -> list[Any]:
    """The arguments in the schema that the operator writes to."""
    return [argument for argument in op._schema.arguments if argument.is_write]


def functional_form(op: OpOverload) -> OpOverload:
    """The operator that returns what the given one writes; it is made when it is first asked for."""
    if op not in _FORMS:
        name = re.sub(r"\W", "_", op.name())
        schema = str(op._schema)
        arguments = _ALIAS.sub("", schema[schema.index("(") : schema.rindex(" -> ")])
        new = [_TYPES[str(argument.type)] for argument in changed_arguments(op)]
        returned = [_TYPES.get(str(r.type), str(r.type)) for r in op._schema.returns if r.alias_info is None]
        tags = [tag for tag in op.tags if tag is torch.Tag.nondeterministic_seeded]
        library.define(f"{name}{arguments} -> ({', '.join([*returned, *new])})", tags=tags)
        library.impl(name, lambda *args, **kwargs: _value(op, args, kwargs), "CompositeExplicitAutograd")
        form = getattr(torch.ops.fomoh_fx_functional, name).default
        library.impl(name, lambda *args, **kwargs: _under_autograd(form, args, kwargs), "Autograd")
        _FORMS[op], CHANGING[form] = form, op
    return _FORMS[op]


_TYPES = {"Tensor": "Tensor", "List[Tensor]": "Tensor[]", "Optional[Tensor]": "Tensor?"}


def named(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The given arguments by their names in the schema."""
    return {a.name: value for a, value in zip(op._schema.arguments, args, strict=False)} | kwargs


def apart(op: OpOverload, results: Any) -> tuple[list[Any], list[Any]]:
    """The results of a functional form: what the operator returns anew, and the new values of what it changes."""
    listed = list(results) if len(functional_form(op)._schema.returns) != 1 else [results]
    count = len(changed_arguments(op))
    return listed[: len(listed) - count], listed[len(listed) - count :]


def _value(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    given = named(op, args, kwargs)
    changed = [argument.name for argument in changed_arguments(op)]
    given |= {name: pytree.tree_map_only(Tensor, torch.clone, given[name]) for name in changed}
    out = op(**given)
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    fresh = [o for o, r in zip(outs, op._schema.returns, strict=False) if r.alias_info is None]
    results = [*fresh, *(given[name] for name in changed)]
    return results[0] if len(results) == 1 else tuple(results)


def _under_autograd(form: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        results = form(*args, **kwargs)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return without_backward(results, tensors, str(CHANGING[form]))


def without_backward(results: Any, tensors: Sequence[Tensor], name: str) -> Any:
    """The results, connected to the tensors for autograd by a backward that refuses."""
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return results
    leaves, spec = pytree.tree_flatten(results)
    linked = [leaf.is_floating_point() or leaf.is_complex() for leaf in leaves]
    values = [leaf for leaf, is_linked in zip(leaves, linked, strict=True) if is_linked]
    found = iter(apply_function(_WithoutBackward, name, len(values), *values, *tensors) if values else ())
    return pytree.tree_unflatten([next(found) if t else leaf for t, leaf in zip(linked, leaves, strict=True)], spec)


class _WithoutBackward(Function):
    """Values that depend on tensors in a way that autograd does not know."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UnsupportedOpError(f"the model differentiates {ctx.name} itself, of which PyTorch knows no derivative")
