"""Where PyTorch takes tensors past its torch functions, as function transforms wrap their arguments: noticed, too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch._functorch import eager_transforms, vmap

from fomoh_fx.capture.threads import is_in

#: Where it is done, and which argument is the tensor, by position and by name.
_ENTRANCES: tuple[tuple[Any, str, int, str], ...] = (
    (eager_transforms, "_wrap_for_grad", 0, ""),
    (eager_transforms, "_maybe_wrap_functional_tensor", 0, ""),
    (eager_transforms, "_propagate_functional_input_mutation", 0, ""),
    (vmap, "_add_batch_dim", 0, ""),
    (nn.Parameter, "__new__", 1, "data"),
)


@contextmanager
def entrances_noticed(own: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What enters a function transform, or becomes a parameter, is what stands for it in the run."""
    thread = threading.get_ident()

    def entering(enter: Callable[..., Any], position: int, keyword: str) -> Callable[..., Any]:
        def entered(*args: Any, **kwargs: Any) -> Any:
            if not is_in(thread):
                return enter(*args, **kwargs)
            given = [*args[:position], *map(_mapped, args[position : position + 1]), *args[position + 1 :]]
            return enter(*given, **{name: _mapped(x) if name == keyword else x for name, x in kwargs.items()})

        return entered

    def _mapped(x: Any) -> Any:
        return own(x) if isinstance(x, Tensor) else x

    with ExitStack() as stack:
        for where, name, position, keyword in _ENTRANCES:
            stack.enter_context(patch.object(where, name, entering(getattr(where, name), position, keyword)))
        yield
