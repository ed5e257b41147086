"""Counting skipped steps where the parameters are, and saying so once, without waiting for the device."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


class SkippedSteps:
    """The count lives on the device; a pinned copy on the host follows it asynchronously.

    On the CPU a skipped step is reported at once, elsewhere as soon as a later step finds that the copy has arrived.
    """

    def __init__(self) -> None:
        self._count: Tensor | None = None
        self._copy: Tensor | None = None
        self._restored = 0
        self._reported = False

    def count(self, skipped: Tensor) -> None:
        """Add one where ``skipped``, a 0-dim bool, is True."""
        if self._count is None or self._copy is None:
            on_device = skipped.device.type == "cuda"
            self._count = torch.zeros((), dtype=torch.int64, device=skipped.device)
            self._copy = torch.zeros((), dtype=torch.int64, pin_memory=True) if on_device else self._count
        self._report()
        self._count += skipped
        if self._copy is not self._count:
            self._copy.copy_(self._count, non_blocking=True)
        else:
            self._report()

    @property
    def total(self) -> int:
        """The number of skipped steps; waits for the device."""
        return self._restored + (0 if self._count is None else int(self._count))

    def restore(self, total: int) -> None:
        """Go on counting from ``total``."""
        self._restored, self._count, self._copy = total, None, None

    def _report(self) -> None:
        if self._reported or self._copy is None or not int(self._copy):
            return
        self._reported = True
        warnings.warn(
            "a step was skipped, because the loss, a derivative or the step itself was not finite; the parameters were "
            "left as they were. The optimizer counts such steps in `skipped`, and warns only once",
            stacklevel=6,
        )
