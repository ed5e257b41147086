"""In which type operators compute inside: PyTorch's half types in float32."""

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """The value in the type that PyTorch computes it in."""
    return x.to(torch.float32) if x.dtype in HALF else x
