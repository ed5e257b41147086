"""Where the figures come from."""

from __future__ import annotations

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


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
