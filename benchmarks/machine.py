"""Where the figures come from."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import torch


def description(device: str) -> dict[str, Any]:
    model = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


#: glibc's mallopt: its number for each parameter, the environment variable of the same, and what it is set to.
_MALLOC = ((-4, "MALLOC_MMAP_MAX_", 0), (-1, "MALLOC_TRIM_THRESHOLD_", 2**31 - 1), (-2, "MALLOC_TOP_PAD_", 2**26))


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation, here and in the processes started from now on.

    It gives large arrays back to the system at once, and then a program on a CPU waits for fresh pages in every
    repetition: measured, a quarter of a plane's time at K = 8. Users get the same from these variables, or jemalloc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for number, variable, value in _MALLOC:
        os.environ[variable] = str(value)
        if mallopt is not None:
            mallopt(number, value)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
