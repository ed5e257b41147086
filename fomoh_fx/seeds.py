"""Seeds: the tangents that a caller gives, checked and matched with what they belong to."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fomoh_fx.capture import Call, Input, Program
from fomoh_fx.capture.hooks import refuse_hooks_of
from fomoh_fx.capture.reading import are_equal
from fomoh_fx.errors import ArgumentError
from fomoh_fx.low_rank import LowRank
from fomoh_fx.passes.expand import Form
from fomoh_fx.records import flattened, opened


@dataclass(frozen=True)
class Seeds:
    """Stacks of tangents ``[K, *shape]`` and what each belongs to: a parameter's name, or the number of a tensor leaf.

    Those of parameters may be factored.

    ``given_as`` are the caller's own names of the parameters; ``present`` says which leaves of the caller's structure
    of input tangents are not None, and ``alike`` along which axes each of these had been expanded from one element: its
    stack has one there.
    """

    owners: tuple[str | int, ...]
    stacks: tuple[Tensor | LowRank, ...]
    directions: int
    given_as: tuple[str, ...] = ()
    present: list[bool] = field(default_factory=list)
    alike: tuple[tuple[int, ...], ...] = ()

    @property
    def by_name(self) -> bool:
        """Whether the tangents are a mapping from parameter names."""
        return bool(self.given_as)

    @property
    def forms(self) -> tuple[Form, ...]:
        """The form in which each stack is given."""
        if self.alike:
            return tuple(axes or None for axes in self.alike)
        return tuple(stack.rank if isinstance(stack, LowRank) else None for stack in self.stacks)

    def positions(self, program: Program) -> list[int]:
        """The positions of the seeded inputs of a program."""
        return [_position(program.inputs, owner) for owner in self.owners]


def _position(inputs: Sequence[Input], owner: str | int) -> int:
    for i, what in enumerate(inputs):
        if what.index == owner if what.kind == "argument" else what.kind == "parameter" and what.name == owner:
            return i
    raise KeyError(owner)


def selected_parameters(module: nn.Module, wrt: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that ``wrt`` selects, by their first names.

    Raises:
        ArgumentError: a pattern matches nothing, or there is no parameter at all.
    """
    return _selected(dict(module.named_parameters(remove_duplicate=False)), wrt)


def _selected(names: Mapping[str, nn.Parameter], wrt: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """Among all names of all parameters."""
    if not names:
        raise ArgumentError('wrt: the model has no parameters; for a function use wrt="inputs"')
    first = _first_names(names)
    if wrt == "parameters":
        return {name: names[name] for name in first.values()}
    patterns = [wrt] if isinstance(wrt, str) else list(wrt)
    if not patterns:
        raise ArgumentError("wrt: selects no parameter")
    chosen: set[int] = set()
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ArgumentError(f"wrt: no parameter matches {pattern!r}; there are {_listing(names)}")
        chosen.update(id(names[name]) for name in matched)
    return {name: names[name] for key, name in first.items() if key in chosen}


def _first_names(names: Mapping[str, nn.Parameter]) -> dict[int, str]:
    """The first name of each parameter, by its identity."""
    first: dict[int, str] = {}
    for name, p in names.items():
        first.setdefault(id(p), name)
    return first


def refuse_lazy(module: nn.Module) -> None:
    """A parameter or buffer of a lazy module has no shape before the first call.

    Raises:
        ArgumentError: naming it.
    """
    tables = (table for part in module.modules() for table in (part._parameters, part._buffers))
    if not any(is_lazy(tensor) for table in tables for tensor in table.values() if tensor is not None):
        return
    everything = (*module.named_parameters(), *module.named_buffers())
    name = next(name for name, tensor in everything if is_lazy(tensor))
    raise ArgumentError(f"model: {name} has no shape yet; call the model once before, which gives it one")


def _listing(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", .. ({len(names)} in all)" if len(names) > most else "")


def parameter_seeds(module: nn.Module, wrt: str | Sequence[str], tangents: Any) -> Seeds:
    """The tangents of parameters, from a mapping name -> ``[K, *shape]``."""
    if not isinstance(tangents, Mapping):
        raise ArgumentError(f"tangents: expected a mapping from parameter names, got {type(tangents).__name__}")
    everything = dict(module.named_parameters(remove_duplicate=False))
    allowed = _selected(everything, wrt)
    first = _first_names(everything)
    found: dict[str, Tensor | LowRank] = {}
    given_as: dict[str, str] = {}
    for name, tangent in tangents.items():
        if name not in everything:
            raise ArgumentError(f"tangents: the model has no parameter {name!r}; there are {_listing(everything)}")
        key = first[id(everything[name])]
        if key in found:
            raise ArgumentError(f"tangents: {name!r} and {given_as[key]!r} are one tied parameter; give one of them")
        if key not in allowed:
            raise ArgumentError(f"tangents: parameter {name!r} is outside wrt={wrt!r}")
        if tangent is None:
            continue
        _check(f"of parameter {name!r}", tangent, everything[name])
        found[key], given_as[key] = tangent.contiguous(), name
    ordered = [name for name in first.values() if name in found]
    seeds = _seeds(ordered, [found[name] for name in ordered], [f"parameter {given_as[n]!r}" for n in ordered])
    return replace(seeds, given_as=tuple(given_as[name] for name in ordered))


def input_seeds(model: Any, call: Call, tangents: Any) -> Seeds:
    """The tangents of inputs, in the structure of the arguments, or by the names of ``forward``'s arguments."""
    arguments = _by_argument(model, call, tangents)
    owners: list[int] = []
    stacks: list[Tensor] = []
    labels: list[str] = []
    alike: list[tuple[int, ...]] = []
    number = 0
    for label, value, tangent in arguments:
        leaves, spec = flattened(value)
        if tangent is None:
            parts: list[Any] = [None] * len(leaves)
        else:
            parts, tangent_spec = pytree.tree_flatten(opened(tangent, _is_low_rank), is_leaf=_is_low_rank)
            if tangent_spec != spec:
                raise ArgumentError(
                    f"tangents: for {label} they must have the argument's own structure {spec}, got {tangent_spec}"
                )
        for leaf, part in zip(leaves, parts, strict=True):
            if not isinstance(leaf, Tensor):
                if part is not None and not are_equal(part, leaf):  # as plain data in an object are
                    raise ArgumentError(f"tangents: for {label} there is one for {leaf!r}, which is not a tensor")
                continue
            if isinstance(part, LowRank):
                raise ArgumentError(f"tangents: for {label} there is a LowRank one; only parameters may have these")
            if part is not None:
                _check(f"of {label}", part, leaf)
                owners.append(number)
                alike.append(axes_alike(part))
                stacks.append(once(part, alike[-1]).contiguous())
                labels.append(label)
            number += 1
    present = [leaf is not None for leaf in pytree.tree_leaves(tangents)]
    return replace(_seeds(owners, stacks, labels), present=present, alike=tuple(alike))


def _is_low_rank(x: Any) -> bool:
    return isinstance(x, LowRank)


def axes_alike(stack: Tensor) -> tuple[int, ...]:
    """The axes of a stack of tangents, but for the directions', along which it was expanded; Dynamo reads this."""
    return tuple([d for d in range(1, stack.dim()) if stack.stride(d) == 0 and stack.shape[d] > 1])


def once(stack: Tensor, axes: Sequence[int]) -> Tensor:
    """One element along these axes; Dynamo reads this."""
    for d in axes:
        stack = stack.narrow(d, 0, 1)
    return stack


def _by_argument(model: Any, call: Call, tangents: Any) -> list[tuple[str, Any, Any]]:
    """(label, argument, tangent) for each argument of the call, positional ones first."""
    names = positional_names(model, len(call.args))
    positional = [(name, value) for name, value in zip(names, call.args, strict=True)]
    if isinstance(tangents, Mapping):
        given = dict(tangents)
        rows = [(f"argument {n!r}", v, given.pop(n, None)) for n, v in (*positional, *call.kwargs.items())]
        if given:
            known = _listing([n for n, _ in positional] + list(call.kwargs))
            raise ArgumentError(f"tangents: the call has no argument {next(iter(given))!r}; there are {known}")
        return rows
    if not isinstance(tangents, Sequence):
        raise ArgumentError(
            "tangents: expected a sequence with one entry for each argument, or a mapping, "
            f"got {type(tangents).__name__}"
        )
    if len(tangents) != len(positional):
        raise ArgumentError(f"tangents: {len(tangents)} entries for {len(positional)} positional arguments")
    rows = [(f"argument {n!r}", v, t) for (n, v), t in zip(positional, tangents, strict=True)]
    return rows + [(f"argument {n!r}", v, None) for n, v in call.kwargs.items()]


def positional_names(model: Any, count: int) -> list[str]:
    """The names of the first ``count`` positional arguments of a model's ``forward``, or of a function."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds][:count]
    return names + [f"argument_{i}" for i in range(len(names), count)]


def _check(label: str, tangent: Any, primal: Tensor) -> None:
    parts = (tangent.left, tangent.right) if isinstance(tangent, LowRank) else (tangent,)
    for part in parts:
        if not isinstance(part, Tensor):
            raise ArgumentError(f"tangents: the tangent {label} must be a tensor, got {type(part).__name__}")
    if not (primal.is_floating_point() or primal.is_complex()):
        raise ArgumentError(f"tangents: {label[3:]} has dtype {primal.dtype}, which has no derivative")
    if isinstance(tangent, LowRank):
        _check_factors(label, tangent, primal)
    elif tangent.dim() != primal.dim() + 1 or tangent.shape[1:] != primal.shape:
        raise ArgumentError(
            f"tangents: the tangent {label} must have shape [K, {', '.join(map(str, primal.shape))}], "
            f"got {list(tangent.shape)}"
        )
    if tangent.shape[0] == 0:
        raise ArgumentError(f"tangents: the tangent {label} has no direction (K = 0)")
    for part in parts:
        if part.layout != torch.strided:
            raise ArgumentError(f"tangents: the tangent {label} must be dense, got {part.layout}")
        if part.dtype != primal.dtype:
            raise ArgumentError(f"tangents: the tangent {label} must have dtype {primal.dtype}, got {part.dtype}")
        if part.device != primal.device:
            raise ArgumentError(f"tangents: the tangent {label} must be on {primal.device}, got {part.device}")
    refuse_hooks_of(primal, label[3:])


def _check_factors(label: str, tangent: LowRank, primal: Tensor) -> None:
    left, right = tangent.left, tangent.right
    if primal.dim() < 2:
        raise ArgumentError(
            f"tangents: the tangent {label} cannot be LowRank: it has {primal.dim()} axes, and needs two or more"
        )
    first, *rest = primal.shape
    fit = left.dim() == 3 and right.dim() == primal.dim() + 1
    if not fit or left.shape[1] != first or right.shape != (left.shape[0], left.shape[2], *rest):
        raise ArgumentError(
            f"tangents: the factors {label} must have shapes [K, {first}, R] and [K, R, "
            f"{', '.join(map(str, rest))}], got {list(left.shape)} and {list(right.shape)}"
        )


def _seeds(owners: Sequence[str | int], stacks: Sequence[Tensor | LowRank], labels: Sequence[str]) -> Seeds:
    if not stacks:
        raise ArgumentError("tangents: none is given, so there is no direction")
    directions = stacks[0].shape[0]
    for label, stack in zip(labels, stacks, strict=True):
        if stack.shape[0] != directions:
            raise ArgumentError(
                f"tangents: K differs: {labels[0]} has {directions} directions, {label} has {stack.shape[0]}"
            )
    return Seeds(tuple(owners), tuple(stacks), directions)
