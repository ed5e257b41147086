"""Checkpoints: they change what autograd saves, not the derivative.

The usual kind saves nothing of its function and runs it again when autograd asks, on detached values, which autograd
knows where to connect, and a graph does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

from torch.utils import checkpoint


def checkpoints_saved() -> AbstractContextManager[Any]:
    """Let autograd save what the functions of checkpoints compute, for derivatives inside the model."""
    return patch.object(checkpoint, "_checkpoint_without_reentrant_generator", _around)


def _around(
    function: Any, preserve_rng_state: bool = True, context_fn: Callable[[], Any] = checkpoint.noop_context_fn, *_: Any,
    **__: Any,
) -> Iterator[None]:  # fmt: skip
    """What surrounds the function: a context of the user's, but none of PyTorch's, which chooses what is saved."""
    forward = context_fn()[0]
    with ExitStack() as stack:
        if type(forward).__module__ != checkpoint.__name__:
            stack.enter_context(forward)
        yield
