"""Models with packed sequences: captured by a mask of the places that are kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fomoh_fx
from tests.models.checking import Problem, check

LENGTHS = torch.tensor([3, 1, 2])


class Model(nn.Module):
    """A layer over a packed sequence whose rows are changed before and after."""

    def __init__(self, layer: nn.Module, batch_first: bool, is_sorted: bool = False, total: int | None = None) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(3, 3), layer, nn.LazyLinear(2)
        self.batch_first, self.is_sorted, self.total = batch_first, is_sorted, total

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        packed = pack_padded_sequence(x, lengths, self.batch_first, self.is_sorted)
        packed = PackedSequence(self.before(packed.data).tanh(), *packed[1:])
        packed, last = self.layer(packed)
        packed = PackedSequence(self.after(packed.data), *packed[1:])
        out, lengths = pad_packed_sequence(packed, self.batch_first, padding_value=-1.0, total_length=self.total)
        return out, lengths, *(last if isinstance(last, tuple) else (last,))


def problem(layer: nn.Module, x: Tensor, lengths: Tensor = LENGTHS, **options: bool | int) -> Problem:
    torch.manual_seed(0)
    model = Model(layer, layer.batch_first, **options).double()  # type: ignore[arg-type]
    model(x, lengths)
    return Problem(model, (x, lengths))


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(3, 2, num_layers=2, batch_first=True),
        nn.LSTM(3, 4, proj_size=2),
        nn.GRU(3, 2, bidirectional=True),
        nn.RNN(3, 2, nonlinearity="relu", bias=False, batch_first=True),
        nn.RNN(3, 2),
    ],
    ids=str,
)
def test_layers(layer: nn.Module) -> None:
    check(problem(layer, r(3, 3, 3)))


def test_other_lengths_at_the_same_signature() -> None:
    p = problem(nn.LSTM(3, 2, batch_first=True), r(3, 3, 3), total=5)
    hd = fomoh_fx.transform(p.model, p.loss)
    tangents = p.directions(2)
    for lengths in (LENGTHS, torch.tensor([1, 3, 3])):
        out = hd(p.args[0], lengths, tangents=tangents, targets=())
        torch.testing.assert_close(out.primal, p.loss(p.model(p.args[0], lengths)))
    assert len(hd._traced) == 1


def test_what_the_capture_takes_for_granted_is_checked() -> None:
    p = problem(nn.GRU(3, 2, batch_first=True), r(3, 3, 3), torch.tensor([3, 2, 1]), is_sorted=True)
    hd = fomoh_fx.transform(p.model, p.loss)
    hd(*p.args, tangents=p.directions(1), targets=())
    for lengths, why in (
        ([3, 1, 2], "decreasing order"),
        ([3, 3, 0], "positive"),
        ([2, 2, 1], "cut it to that length"),
    ):
        with pytest.raises(RuntimeError, match=why):
            hd(p.args[0], torch.tensor(lengths), tangents=p.directions(1), targets=())
