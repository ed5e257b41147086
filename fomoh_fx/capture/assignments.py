"""Tensors that a model assigns to its attributes while it runs: ``self.mean = 0.9 * self.mean + 0.1 * y.mean()``.

Capture leaves the model as it was. The new tensors are outputs of the graph, and each call assigns them, as the model
itself would.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fomoh_fx.errors import CaptureError

#: Tensors that a call has assigned, and the parameter that each was computed from: the derivative ended with the call.
COMPUTED_FROM = WeakIdKeyDictionary()


class Assignments:
    """While it is entered, the attributes of modules are watched; in the end each is what it was.

    Attributes:
        values: the tensors that were assigned, by the path of the module and the name of the attribute.
    """

    def __init__(self, root: nn.Module) -> None:
        self.values: dict[tuple[str, str], Tensor] = {}
        self._before: list[tuple[str | None, nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        for path, module in root.named_modules():
            self.watch(module, path)

    def watch(self, module: nn.Module, path: str | None = None) -> None:
        """Watch a module; without a path, only to put its attributes back."""
        self._before.append((path, module, dict(vars(module)), dict(module._buffers), dict(module._parameters)))

    def __enter__(self) -> Assignments:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for path, module, attributes, buffers, parameters in self._before:
            new = _undone(vars(module), attributes) | _undone(module._buffers, buffers)
            if path is not None:
                self.values.update({(path, name): value for name, value in new.items()})
            if _undone(module._parameters, parameters) and kind is None:
                raise CaptureError(
                    f"model: assigns another tensor to a parameter of its {type(module).__name__} while it runs; "
                    "compute with the new tensor under another name"
                )


def _undone(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that were assigned since; what they replaced is back."""
    assigned = {k: v for k, v in now.items() if isinstance(v, Tensor) and v is not before.get(k)}
    for name in assigned:
        if name in before:
            now[name] = before[name]
        else:
            del now[name]
    return assigned


def remembered(what: str, parameter: str) -> CaptureError:
    """The refusal of a tensor that an earlier call computed from a parameter: no graph of this call has the rest."""
    return CaptureError(
        f"model: uses {what} that an earlier call computed from the parameter {parameter!r} and kept, so its "
        "derivative would be lost. Compute it anew at every call, or detach it before it is kept; where it is a cache, "
        "clear it (model.train() and then model.eval() often do)"
    )
