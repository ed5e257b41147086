"""Known values stand for tensors while a model is captured, and for no longer."""

import pytest
import torch
from torch import nn

from fomoh_fx.capture.constants import AsConstants


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("first", torch.tensor([1, 2]))
        self.register_buffer("second", torch.tensor([3, 4]))


def test_an_error_half_way_puts_everything_back():
    holder = Holder()
    before = dict(holder.named_buffers())
    unreadable = torch.empty(2, dtype=torch.int64, device="meta")
    with pytest.raises(NotImplementedError), AsConstants(holder, {"first": before["first"], "second": unreadable}):
        raise AssertionError("is not reached")
    assert all(buffer is before[name] for name, buffer in holder.named_buffers())
