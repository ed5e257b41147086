"""The signature of a call: everything that the compiled graph depends on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fomoh_fx.capture import Call
from fomoh_fx.capture.state import STANDARD
from fomoh_fx.rules.products import products_are_exact
from fomoh_fx.seeds import Seeds


@dataclass(frozen=True)
class Signature:
    """What is equal for two calls that one specialisation serves; hashable.

    ``shapes`` are those of the call's tensors; ``rest`` is everything else: the structure, dtypes, devices,
    layouts, arguments that are not tensors, parameters, settings, modes, and which inputs are seeded with how many
    directions.
    """

    shapes: tuple[torch.Size, ...]
    rest: tuple[Any, ...]


def signature_of(module: nn.Module, loss: Any, call: Call, seeds: Seeds) -> Signature:
    """The signature of one call of the model (and loss)."""
    kinds = tuple(kind_of(t)[1:] for t in call.tensors)
    state = tuple(kind_of(t)[:-1] for t in (*module.parameters(), *module.buffers()))  # modes have the last
    others = tuple((type(o), _hashable(o)) for o in call.others)
    default = torch.get_default_device(), products_are_exact()
    settings = settings_of(module) + (settings_of(loss) if isinstance(loss, nn.Module) else ())
    modes = tuple(modes_of(module, loss))
    rest = (call.spec, kinds, others, state, settings, modes, default, seeds.owners, seeds.directions)
    return Signature(tuple(t.shape for t in call.tensors), rest)


def kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """What a model may ask of a tensor, beside its values; Dynamo reads this."""
    return tensor.shape, tensor.dtype, tensor.device, strides_of(tensor), tensor.requires_grad


def strides_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The layout of a tensor that is not contiguous: a recorded view is legal for one layout. Dynamo reads this."""
    return None if tensor.is_contiguous() else tensor.stride()


#: Attributes that a graph has as constants: a dropout's rate, an activation function.
_PLAIN = (bool, int, float, str, type(None), FunctionType, BuiltinFunctionType)


def settings_of(module: nn.Module) -> tuple[Any, ...]:
    """What makes every submodule compute what it does, beside its state: class, hooks, plain attributes."""
    return tuple((type(m), *_hooks(m), *_attributes(m)) for m in module.modules())


def plain_settings(*modules: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """The settings and training flags of modules that Dynamo can compare: by submodule and name."""
    attributes = [(m, name, value) for top in modules for m in top.modules() for name, value in vars(m).items()]
    own = [(m, name, value) for m, name, value in attributes if name == "training" or name not in STANDARD]
    return [(m, name, value) for m, name, value in own if type(value) in _PLAIN]


def _attributes(module: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Plain values, and the kinds of tensors: a model may ask whether it has one already, and of which shape."""
    for name, value in vars(module).items():
        if type(value) in _PLAIN:
            yield name, type(value), value
        elif isinstance(value, Tensor):
            yield name, value.shape, value.dtype


def _hooks(module: nn.Module) -> Iterator[tuple[int, ...]]:
    """The hooks that run with a module, by numbers that PyTorch gives only once."""
    own = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return (tuple(hooks) for hooks in own)


def modes_of(module: nn.Module, loss: Any) -> list[Any]:
    """What changes what the model does, beside its settings and arguments; Dynamo reads this.

    Training of every submodule, whether parameters require gradients, the default dtype, and autocast. Capture depends
    neither on the caller's grad mode nor on flags of backends, which kernels read when they run.
    """
    modes: list[Any] = [torch.get_default_dtype(), *flags_of(module)]
    if isinstance(loss, nn.Module):
        modes += flags_of(loss)
    for device in ("cpu", "cuda"):
        enabled = torch.is_autocast_enabled(device)
        modes += [enabled, torch.get_autocast_dtype(device) if enabled else None]
    return modes


def flags_of(module: nn.Module) -> list[bool]:
    """Of the modules, whether they train, and of the parameters, whether they require gradients; Dynamo reads this."""
    return [m.training for m in module.modules()] + [p.requires_grad for p in module.parameters()]


class _ByIdentity:
    """An argument that cannot be hashed, kept alive so that its identity stays its own."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return _ByIdentity(value)
    return value
