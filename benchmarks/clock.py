"""The time of one call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """By events on the stream where the device is a GPU, otherwise by the clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3
