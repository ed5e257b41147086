"""The signature of a call: everything that the compiled graph depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from fomoh_fx.capture import Call
from fomoh_fx.capture.reading import Reader, kind_of, unusual_strides_of
from fomoh_fx.capture.state import STANDARD
from fomoh_fx.rules.products import products_are_exact
from fomoh_fx.rules.registry import GIVEN
from fomoh_fx.seeds import Seeds


@dataclass(frozen=True)
class Signature:
    """What is equal for two calls that one specialisation serves; hashable.

    ``shapes`` are those of the call's tensors; ``call`` is what else there is of it and of the model: the structure,
    dtypes, devices, layouts, arguments that are not tensors, modules, parameters, settings. ``request`` is what its
    graph is expanded for: modes and the like, and which inputs are seeded with how many directions. ``kept`` are the
    objects that count by identity, alive so that no other one gets it.
    """

    shapes: tuple[torch.Size, ...]
    call: tuple[Any, ...]
    request: tuple[Any, ...]
    kept: list[Any] = field(compare=False)


def signature_of(model: Any, loss: Any, call: Call, seeds: Seeds) -> Signature:
    """The signature of one call of the model (and loss)."""
    reader = Reader()
    kinds = tuple([(*argument_kind_of(t)[1:], t.is_conj(), t.is_neg(), unusual_strides_of(t)) for t in call.tensors])
    others = tuple(map(reader.value, call.others))
    modules = [reader.modules(f) if isinstance(f, nn.Module) else reader.callable(f) for f in (model, loss)]
    default = torch.get_default_device(), products_are_exact(), tuple(GIVEN.items()), *modes()
    request = (default, seeds.owners, seeds.directions, seeds.forms)
    return Signature(tuple(t.shape for t in call.tensors), (call.spec, kinds, others, *modules), request, reader.kept)


def argument_kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """What a model may ask of an argument; Dynamo reads this."""
    return (*kind_of(tensor), tensor.is_leaf, isinstance(tensor, nn.Parameter))


def modes() -> list[Any]:
    """What changes what every model does: the default dtype, autocast, determinism, hooks of all modules.

    Dynamo reads this. Capture depends neither on the caller's grad mode nor on flags of backends, which kernels read
    when they run.
    """
    found: list[Any] = [torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()]
    for device in ("cpu", "cuda"):
        enabled = torch.is_autocast_enabled(device)
        found += [enabled, torch.get_autocast_dtype(device) if enabled else None]
    for hooks in (torch_modules._global_forward_pre_hooks, torch_modules._global_forward_hooks):
        found += [key for key, hook in hooks.items() if not hook.__module__.startswith("torch.")]  # those only count
    return found


#: Settings that Dynamo can compare.
_PLAIN = (bool, int, float, str, type(None), FunctionType, BuiltinFunctionType, MethodType, torch.dtype)


def plain_settings(*modules: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """The settings of modules that Dynamo can compare: by submodule and name, what changes in place as a copy."""
    parts = [m for top in modules for m in top.modules()]
    own = [(m, name, value) for m in parts for name, value in vars(m).items() if name not in STANDARD]
    return [(m, name, _copied(value)) for m, name, value in own if _is_comparable(value)]


def _copied(value: Any) -> Any:
    """A copy of the containers in a setting."""
    if type(value) is dict:
        return {key: _copied(inner) for key, inner in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def _is_comparable(value: Any, depth: int = 8) -> bool:
    if type(value) in (list, tuple, dict):
        inside = value.values() if type(value) is dict else value
        return depth > 0 and all(_is_comparable(x, depth - 1) for x in inside)  # one may be in itself
    return type(value) in _PLAIN or isinstance(value, (type, nn.Module))


def modules_of(top: nn.Module) -> list[Any]:
    """Which modules there are, whether they train, and whether tensors require gradients; Dynamo reads this."""
    named = [(name, id(m)) for name, m in top.named_modules(remove_duplicate=False)]
    tensors = [p.requires_grad for p in top.parameters()] + [b.requires_grad for b in top.buffers()]
    return named + [m.training for m in top.modules()] + tensors
