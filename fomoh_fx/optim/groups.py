"""Groups: which parameters an optimizer moves, and what they are called in the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fomoh_fx.errors import ArgumentError
from fomoh_fx.optim.checks import at_least_zero
from fomoh_fx.seeds import selected_parameters
from fomoh_fx.transform import HyperDualModule

Group = dict[str, Any]

_NO_ORDER = "params: a set has no order, so directions would not be reproducible; give a list"


def selected(hd: HyperDualModule) -> dict[str, nn.Parameter]:
    """The parameters that ``hd.wrt`` selects and that have derivatives, by name."""
    chosen = selected_parameters(hd.module, hd.wrt)
    return {name: p for name, p in chosen.items() if p.is_floating_point() or p.is_complex()}


def groups_of(params: Iterable[Any] | None, hd: HyperDualModule) -> list[Group]:
    """One group of the parameters, those that are given, or all; groups as they are.

    Raises:
        ArgumentError: they are no parameters, none, or in no order.
    """
    if isinstance(params, set):
        raise ArgumentError(_NO_ORDER)
    if params is not None and not isinstance(params, Iterable):
        raise ArgumentError(f"params: expected parameters or groups of them, got {params!r}")
    chosen = list(selected(hd).values() if params is None else params)
    if not chosen:
        raise ArgumentError("params: there is none")
    return chosen if isinstance(chosen[0], dict) else [{"params": chosen}]


def named(params: Any, hd: HyperDualModule) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a group with their names in the model.

    Raises:
        ArgumentError: one is not the model's, has no derivatives, or is there twice; or there is none.
    """
    names = {id(p): name for name, p in selected(hd).items()}
    if isinstance(params, set):
        raise ArgumentError(_NO_ORDER)
    found: list[tuple[str, nn.Parameter]] = []
    entries: Iterable[Any] = [params] if isinstance(params, Tensor) else params
    for entry in entries:
        p = entry[1] if isinstance(entry, tuple) else entry
        if isinstance(p, nn.Parameter) and not (p.is_floating_point() or p.is_complex()):
            raise ArgumentError(f"params: there is one of {p.dtype}, which has no derivatives; leave it out")
        if not isinstance(p, nn.Parameter) or id(p) not in names:
            raise ArgumentError("params: there is one that is not among the model's parameters that hd.wrt selects")
        if any(p is known for _, known in found):
            raise ArgumentError(f"params: {names[id(p)]} is there twice")
        found.append((names[id(p)], p))
    if not found:
        raise ArgumentError("params: there is none in a group")
    return found


def check_rates(groups: Iterable[Group]) -> None:
    """Raise an ArgumentError unless every rate and decay is a finite number of at least zero.

    Schedulers and users set them between steps. A tensor's value is left alone: reading it would wait for the device.
    """
    for group in groups:
        for option in ("lr", "weight_decay"):
            if not isinstance(group[option], Tensor):
                at_least_zero(option, group[option])


def members(groups: Iterable[Group]) -> Iterator[tuple[Group, str, nn.Parameter]]:
    """Every parameter with its group and its name."""
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            yield group, name, p


def trained(groups: Iterable[Group]) -> dict[str, nn.Parameter]:
    """The parameters that move, by name.

    Raises:
        ArgumentError: there is none.
    """
    moving = {name: p for _, name, p in members(groups) if p.requires_grad}
    if not moving:
        raise ArgumentError("params: none of the parameters has requires_grad=True, so there is nothing to train")
    return moving


def rename(groups: Iterable[Group], current: Mapping[str, nn.Parameter]) -> None:
    """Follow parameters that have got other names in the model, by pruning or a module around theirs.

    Args:
        groups: whose names are changed.
        current: what the model's parameters are called now.

    Raises:
        ArgumentError: one that moves is no longer the model's.
    """
    groups = list(groups)
    if all(current.get(name) is p for _, name, p in members(groups) if p.requires_grad):
        return
    now = {id(p): name for name, p in current.items()}
    for _, name, p in members(groups):
        if p.requires_grad and id(p) not in now:
            raise ArgumentError(
                f"params: {name} is no longer the model's: another tensor has taken its place since this optimizer "
                "was made (by assign=True, or a module that was exchanged); make a new optimizer"
            )
    for group in groups:
        pairs = zip(group["params"], group["param_names"], strict=True)
        group["param_names"] = [now.get(id(p), name) for p, name in pairs]
