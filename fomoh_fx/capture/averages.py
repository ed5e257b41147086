"""BatchNorm with ``momentum=None``, whose running statistics are averages over all batches.

It takes its count as a number, which no graph has; the same averages are taken with the count as a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def cumulative_averages_recorded() -> Iterator[None]:
    """While it is entered, such layers are traceable in training."""
    original = _BatchNorm.forward

    def forward(self: _BatchNorm, input: Tensor) -> Tensor:
        count = self.num_batches_tracked if self.training and self.track_running_stats else None
        if self.momentum is not None or count is None or self.running_mean is None or self.running_var is None:
            return original(self, input)
        self._check_input_dim(input)
        count.add_(1)
        with torch.no_grad():
            axes = [d for d in range(input.dim()) if d != 1]
            wide = torch.promote_types(input.dtype, self.running_mean.dtype)
            variance, mean = torch.var_mean(input.to(wide), axes)
            for running, batch in ((self.running_mean, mean), (self.running_var, variance)):
                running.add_((batch.to(running.dtype) - running) / count)
        return torch.nn.functional.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)

    with patch.object(_BatchNorm, "forward", forward):
        yield
