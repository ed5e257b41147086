"""What changes in place shares memory with nothing else that is read."""

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.errors import CaptureError, FomohError

X = torch.linspace(-1, 1, 3, dtype=torch.float64)


class Counted(nn.Module):
    """Reads ``whole`` after it has added to ``part``, which may be a view of it."""

    def __init__(self, part, whole):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("part", part)
        self.register_buffer("whole", whole)

    def forward(self, x):
        self.part.add_(1)
        return (x.sin() * self.scale * self.whole.sum()).sum()


def value(model):
    return fomoh_fx.transform(model)(X, tangents={"scale": torch.ones(1, 3, dtype=torch.float64)}).primal


def test_a_view_of_what_is_read_is_refused():
    whole = torch.ones(2)
    with pytest.raises(
        CaptureError, match=r"part is changed in place and shares memory with whole[\s\S]*test_overlaps"
    ):
        value(Counted(whole[:1], whole))
    assert whole.tolist() == [1, 1]


def test_other_parts_of_one_memory_are_right():
    memory = torch.ones(4)
    model = Counted(memory[:2], memory[2:])
    torch.testing.assert_close(value(model), 2 * X.sin().sum())
    assert memory.tolist() == [2, 2, 1, 1]


def test_a_view_that_is_not_read_is_right():
    memory = torch.ones(4)

    class Unread(Counted):
        def forward(self, x):
            self.part.add_(1)
            return (x.sin() * self.scale).sum() * self.part.sum()

    torch.testing.assert_close(value(Unread(memory[:2], memory)), 4 * X.sin().sum())
    assert memory.tolist() == [2, 2, 1, 1]


def test_one_tensor_as_two_arguments():
    def function(x, counts, same):
        counts.add_(1)
        return (x * same.sum()).sin().sum()

    counts = torch.ones(2, dtype=torch.float64)
    with pytest.raises(CaptureError, match="shares memory"):
        fomoh_fx.transform(function, wrt="inputs")(X, counts, counts, tangents=(X[None], None, None))


def test_a_sparse_tensor_beside_what_changes_is_refused_by_name():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, adjacency):
            self.calls.add_(1)
            return (adjacency @ (x * self.scale)).sum() * self.calls

    hd = fomoh_fx.transform(Graph())
    with pytest.raises(FomohError, match="sparse"):
        hd(X, torch.eye(3, dtype=torch.float64).to_sparse(), tangents={"scale": X[None]})
