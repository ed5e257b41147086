"""Memory: the most that one repetition allocates, beyond what was there before it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peaks(function: Callable[[], Any], device: torch.device) -> dict[str, int | None]:
    """Of allocated memory, and of what the process has resident (on a CPU, where the system tells)."""
    resident = process_peak_bytes(function) if device.type == "cpu" else None
    return {"peak_bytes": peak_bytes(function, device), "process_peak_bytes": resident}


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Of PyTorch's allocator, so that what a compiled program allocates is counted as well."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = function()
    del kept
    live = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def process_peak_bytes(function: Callable[[], Any]) -> int | None:
    """How far the resident memory of this process rises; None where the system does not tell."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what was freed before would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    except OSError:
        return None
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
