"""Initialisation from the first batch: a flag in a buffer decides, and the model sets it."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import fomoh_fx
from fomoh_fx.capture import frontends
from fomoh_fx.errors import CaptureError


class Normalised(nn.Module):
    """Shifts by the mean of the first batch, and scales by what it then knows."""

    def __init__(self, way: str, dtype: torch.dtype = torch.bool) -> None:
        super().__init__()
        self.way = way
        self.is_done, self.mean = nn.Buffer(torch.tensor(0, dtype=dtype)), nn.Buffer(torch.zeros(3))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_done:
            with torch.no_grad():
                self.mean.copy_(x.mean(0))
                self.scale.data = x.std(0).log()
            self.set_done(x)
        y = (x - self.mean) * self.scale.exp()
        return (y.sin() if self.is_done else y.cos()).sum()

    def set_done(self, x: Tensor) -> None:
        if self.way == "fill":
            self.is_done.fill_(True)
        elif self.way == "view":
            self.is_done.view(1)[0] = 1
        elif self.way == "data":
            self.is_done.data = torch.ones_like(self.is_done)
        elif self.way == "assign":
            self.is_done = torch.tensor(True)
        elif self.way == "count":
            self.is_done += 1
        else:
            self.is_done.copy_(x.sum() > 0)


WAYS = [(way, torch.bool) for way in ("fill", "view", "data", "assign")]
WAYS += [("fill", torch.uint8), ("fill", torch.float32)]


@pytest.mark.parametrize("frontend", list(frontends.FRONTENDS))
@pytest.mark.parametrize(("way", "dtype"), WAYS)
def test_a_flag_decides_until_it_is_set(
    way: str, dtype: torch.dtype, frontend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontends, "FRONTENDS", {frontend: frontends.FRONTENDS[frontend]})
    model = Normalised(way, dtype)
    reference, hd = deepcopy(model), fomoh_fx.transform(model)
    for traced in (1, 2, 2, 2):
        x = torch.randn(4, 3)
        out = hd(x, tangents={"scale": torch.ones(1, 3)})
        value = reference(x)
        (slope,) = torch.autograd.grad(value, reference.scale)
        torch.testing.assert_close((out.primal, out.tangent[0]), (value.detach(), slope.sum()))
        torch.testing.assert_close(model.state_dict(), reference.state_dict())
        assert len(hd._traced) == traced
    for m in (model, reference):
        m.is_done.zero_()
    torch.testing.assert_close(hd(x, tangents={"scale": torch.ones(1, 3)}).primal, reference(x).detach())
    assert len(hd._traced) == 2


@pytest.mark.parametrize(("way", "dtype"), [("from data", torch.bool), ("count", torch.int64)])
def test_what_data_set_and_what_counts_is_no_flag(way: str, dtype: torch.dtype) -> None:
    with pytest.raises(CaptureError, match="values of tensors decide"):
        fomoh_fx.transform(Normalised(way, dtype))(torch.randn(4, 3), tangents={"scale": torch.ones(1, 3)})
