"""Streams: the random numbers of directions, and their state."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fomoh_fx.errors import ArgumentError
from fomoh_fx.optim import philox

#: From this many elements on, a compiled program draws faster than PyTorch's own generator does on one core.
MANY = 2**15


class Streams:
    """One stream of random numbers for each device, no two of them alike.

    Args:
        seed: a whole number of 64 bits; None takes one from torch's default generator, so that ``torch.manual_seed``
            decides.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = int(torch.randint(2**62, ())) if seed is None else _whole(seed)
        #: Whether a compiled program fills large tensors on a CPU, with other numbers than PyTorch's generator has.
        self.lowered = False
        self._generators: dict[str, torch.Generator] = {}

    def __call__(self, device: torch.device) -> torch.Generator:
        """The generator of a device."""
        key = str(device)
        if key not in self._generators:
            self._generators[key] = torch.Generator(device).manual_seed(self.seed + len(self._generators))
        return self._generators[key]

    def normals(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """N(0, 1) of this shape, in the dtype and on the device of ``like``, which is real."""
        if self._are_lowered(shape, like):
            return self._lowered(philox.normals, 2, shape, like)
        drawn = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
        return drawn.normal_(generator=self(drawn.device))

    def signs(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Random signs, likewise; PyTorch's generator gives bytes, and a table eight signs for each."""
        if self._are_lowered(shape, like):
            return self._lowered(philox.signs, 64, shape, like)
        count = torch.Size(shape).numel()
        words = torch.empty(-(-count // 32), dtype=torch.int32, device=like.device)
        octets = words.random_(-(2**31), 2**31, generator=self(like.device)).view(torch.uint8)
        table = _signs_of_bytes(like.dtype, like.device)
        return table.index_select(0, octets.int()).flatten()[:count].reshape(tuple(shape))

    def _are_lowered(self, shape: Sequence[int], like: Tensor) -> bool:
        return self.lowered and like.device.type == "cpu" and torch.Size(shape).numel() >= MANY

    def _lowered(self, draw: Callable[..., Tensor], each: int, shape: Sequence[int], like: Tensor) -> Tensor:
        """Numbers by a compiled program, ``each`` of them for a counter."""
        key, stream = torch.randint(2**32, (2,), generator=self(like.device)).unbind()
        count = torch.Size(shape).numel()
        drawn = _compiled(draw)(philox.schedule(key), stream, -(-count // each), like.dtype)
        return drawn[:count].view(tuple(shape))

    def state_dict(self) -> dict[str, Any]:
        """The seed, and the state of each device's generator."""
        states = {device: generator.get_state() for device, generator in self._generators.items()}
        return {"seed": self.seed, "generators": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self.seed = state["seed"]
        states = state["generators"].items()
        self._generators = {device: torch.Generator(device).set_state(known.cpu()) for device, known in states}

    def __getstate__(self) -> dict[str, Any]:
        """For copies: a generator has none of its own, its state has."""
        return {**self.state_dict(), "lowered": self.lowered}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.lowered = state["lowered"]
        self.load_state_dict(state)


@cache
def _compiled(draw: Callable[..., Tensor]) -> Any:
    """One program for all sizes."""
    return torch.compile(draw, fullgraph=True, dynamic=True)


@cache
def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The bits of each byte as signs: [256, 8]."""
    return ((torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1) * 2 - 1).to(device, dtype)


def _whole(seed: Any) -> int:
    try:
        number = operator.index(seed)
    except TypeError:
        number = None
    if number is None or isinstance(seed, bool) or not -(2**63) <= number < 2**63:
        raise ArgumentError(f"seed: expected a whole number of 64 bits, or None, got {seed!r}")
    return number
