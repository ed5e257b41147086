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


def summed(x, counts, other):
    counts.add_(1)
    return (x * other.sum()).sin().sum()


def numbers(n=2):
    return torch.ones(n, dtype=torch.float64)


def same():
    counts = numbers()
    return counts, counts


def views():
    counts = numbers()
    return counts[:], counts[:]


def in_part():
    counts = numbers(3)
    return counts[:2], counts[1:]


def of_numpy():
    counts = numbers().numpy()
    return torch.from_numpy(counts), torch.from_numpy(counts)


@pytest.fixture
def called():
    """``summed`` after a call whose arguments share nothing."""
    hd = fomoh_fx.transform(summed, wrt="inputs")
    hd(X, numbers(), numbers(), tangents=(X[None], None, None))
    return hd


@pytest.mark.parametrize("arguments", [same, views, in_part, of_numpy])
def test_a_later_call_is_looked_at(called, arguments):
    counts, other = arguments()
    with pytest.raises(CaptureError, match=r"counts is changed in place and shares memory with other[\s\S]*add_"):
        called(X, counts, other, tangents=(X[None], None, None))
    assert counts.tolist() == [1, 1]


def test_a_later_call_with_other_parts_of_one_memory(called):
    memory = numbers(4)
    value = called(X, memory[:2], memory[2:], tangents=(X[None], None, None)).primal
    torch.testing.assert_close(value, (2 * X).sin().sum())
    assert memory.tolist() == [2, 2, 1, 1]
    assert len(called._traced) == 1


def test_two_that_are_changed_and_not_read():
    def function(x, a, b):
        a.fill_(1)
        b.fill_(2)
        return x.sin().sum() * a.sum()

    hd = fomoh_fx.transform(function, wrt="inputs")
    torch.testing.assert_close(hd(X, numbers(), numbers(), tangents=(X[None], None, None)).primal, 2 * X.sin().sum())
    with pytest.raises(CaptureError, match="shares memory"):
        hd(X, *in_part(), tangents=(X[None], None, None))


def test_a_buffer_that_became_a_view_of_another():
    model = Counted(torch.zeros(1), torch.ones(2))
    hd = fomoh_fx.transform(model)
    tangents = {"scale": torch.ones(1, 3, dtype=torch.float64)}
    hd(X, tangents=tangents)
    model.part = model.whole[:1]
    with pytest.raises(CaptureError, match="part is changed in place and shares memory with whole"):
        hd(X, tangents=tangents)


def test_one_tensor_as_two_arguments_under_torch_compile(called):
    compiled = torch.compile(called, fullgraph=True, backend="aot_eager")
    compiled(X, numbers(), numbers(), tangents=(X[None], None, None))
    with pytest.raises(Exception, match="share memory"):
        compiled(X, *same(), tangents=(X[None], None, None))


def test_one_buffer_under_two_names_is_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.register_buffer("first", torch.zeros((), dtype=torch.float64))
            self.register_buffer("second", self.first)

        def forward(self, x):
            self.second.add_(1)
            return (x.exp() * self.scale).sum() * self.first

    model = Tied()
    hd = fomoh_fx.transform(model)
    tangents = {"scale": torch.ones(1, 3, dtype=torch.float64)}
    values = [hd(X, tangents=tangents).primal for _ in range(2)]
    torch.testing.assert_close(torch.stack(values), X.exp().sum() * torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert model.first is model.second and model.first == 2
    assert len(hd.latest.program.changed) == 1


def test_a_view_that_only_decides():
    class Decided(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.register_buffer("flags", torch.zeros(2, dtype=torch.bool))
            self.register_buffer("flag", self.flags[0])

        def forward(self, x):
            self.flags.fill_(True)
            return (x.sin() * self.scale).sum() * (2 if self.flag else 1)

    model = Decided()
    with pytest.raises(CaptureError, match="flags is changed in place and shares memory with flag"):
        value(model)
    assert not model.flags.any()


def test_an_argument_that_only_decides():
    def function(x, decides, counts):
        counts.add_(1)
        return x.sin().sum() * (2 if decides[0] == 1 else 1)

    hd = fomoh_fx.transform(function, wrt="inputs")
    memory = torch.zeros(2, dtype=torch.int64)
    hd(X, memory[:1], memory.clone(), tangents=(X[None], None, None))
    with pytest.raises(CaptureError, match="counts is changed in place and shares memory with decides"):
        hd(X, memory[:1], memory, tangents=(X[None], None, None))
    assert not memory.any()


def test_an_attribute_that_became_another_one():
    class Has(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.changed, self.read = torch.zeros(()).double(), torch.ones(()).double()

        def forward(self, x):
            self.changed.add_(1)
            return (x.exp() * self.scale).sum() * self.read

    model = Has()
    hd = fomoh_fx.transform(model)
    tangents = {"scale": torch.ones(1, 3, dtype=torch.float64)}
    other = model.read
    for read, number in ((other, 1.0), (model.changed, 2.0), (model.changed, 3.0), (other, 1.0)):
        model.read = read
        torch.testing.assert_close(hd(X, tangents=tangents).primal, X.exp().sum() * number)
    assert model.changed == 4 and len(hd._traced) == 2
