"""Tensors that a model writes out: their values may decide a branch, until others are written there."""

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import fomoh_fx
from fomoh_fx.errors import CaptureError, FomohError
from tests.models.checking import Problem, check_call
from tests.oracle import relative_error, reverse_over_reverse
from tests.rules.checking import Sample, check


def r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def normalised(x: Tensor) -> Tensor:
    deviation = torch.as_tensor([0.2, 0.3, 0.5], dtype=x.dtype)
    if (deviation == 0).any():
        raise ValueError("a deviation is zero")
    return x / deviation


def repeated(x: Tensor) -> Tensor:
    return x.square().repeat_interleave(int(torch.tensor([1, 2]).sum()))


def changed(x: Tensor) -> Tensor:
    """Also through a view, by other literals."""
    scale = torch.tensor([1, 2, 3])
    scale[0] = 5
    scale[1:].fill_(4)
    return x.square() * int(scale.sum())


def selected(x: Tensor) -> Tensor:
    return x.square()[torch.tensor([True, False, True])]


def as_many_as_selected(x: Tensor) -> Tensor:
    """How many decides."""
    mask = torch.tensor([[True, False, True]])
    y = x.square().unsqueeze(0)[~mask].reshape(1, -1)
    z = x.exp().masked_select(mask[0])
    return y * z if y.shape[1] == 1 and z.shape[0] == 2 else y


def from_numpy(x: Tensor) -> Tensor:
    return x.square() * torch.from_numpy(numpy.linspace(1, 2, 3)) + float(numpy.sqrt(2))


def counted(x: Tensor) -> Tensor:
    """An operator of a fixed size comes after what the counts give."""
    index = torch.repeat_interleave(torch.arange(2), torch.tensor([2, 1]))
    return x.square() * nn.functional.pad(index, (0, 1))[:3]


def kept(x: Tensor) -> Tensor:
    """A mask that is computed, on two dimensions."""
    mask = torch.tensor([[2, 1, 3], [0, 0, 1]]) > torch.tensor([[1], [0]])
    y = torch.stack([x, x.square()]).unsqueeze(0)[:, mask]
    return nn.functional.pad(y, (1, 0)).reshape(2, 2)


def constructed(x: Tensor) -> Tensor:
    """By the classes of tensors: from values, from sizes, from a tensor."""
    scale = torch.DoubleTensor(3).fill_(2) * torch.Tensor(numpy.array([1.0, 2, 3])).type(torch.DoubleTensor)
    return torch.Tensor(x).square() * scale * int(torch.LongTensor([1, 2]).sum()) * isinstance(x, torch.DoubleTensor)


FACTORS = {torch.DoubleTensor: 2.0}


def asked_for_by_class(x: Tensor) -> Tensor:
    """A class of tensors is a key, and a keyword."""
    is_one = torch.DoubleTensor in FACTORS and torch.DoubleTensor == next(iter(FACTORS))
    return (x.square() * FACTORS[torch.DoubleTensor] * is_one).type(dtype=torch.DoubleTensor)


LITERAL = [
    constructed, normalised, repeated, changed, selected, as_many_as_selected, from_numpy, counted, kept,
    asked_for_by_class,
]  # fmt: skip


@pytest.mark.parametrize("function", LITERAL, ids=lambda f: f.__name__)
def test_literals_decide(function):
    check(function, Sample((r(3),)))


def overwritten(x: Tensor) -> Tensor:
    scale = torch.tensor([1.0, 2, 3], dtype=x.dtype)
    scale[1:].copy_(x[1:].detach())
    return x * 5 if scale.sum() == 6 else x * 7


def overwritten_number(x: Tensor) -> Tensor:
    """PyTorch's tracer alone takes the value from before."""
    scale = torch.tensor(2.0, dtype=x.dtype)
    scale.view(1).copy_(x[:1].detach())
    return x * 5 if scale == 2 else x * 7


def gathered(x: Tensor) -> Tensor:
    """PyTorch's fake tensor of the result is made from the literal, and knows what is in uninitialised memory."""
    scale = torch.tensor([1.0, 2, 3], dtype=x.dtype)[x.argsort()]
    return x * 5 if scale.sum() == 6 else x * 7


@pytest.mark.parametrize("function", [overwritten, overwritten_number, gathered], ids=lambda f: f.__name__)
def test_overwritten_values_are_data(function):
    with pytest.raises(CaptureError, match="values of tensors decide"):
        fomoh_fx.transform(function, wrt="inputs")(r(3), tangents=[r(2, 3)])


class Pooled(nn.Module):
    """The sample of each node decides a size; a mask in a buffer, others; a number in one, a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.mask, self.times = nn.Buffer(torch.tensor([True, False, True])), nn.Buffer(torch.tensor([0.0, 0.5]))

    def forward(self, x: Tensor, sample: Tensor) -> Tensor:
        y = self.layer(x)
        for t in torch.arange(3):
            y = y.sin() if t > self.times[1] else y.cos()
        split = torch.cat([y[:, self.mask], y[:, ~self.mask]], 1)
        return x.new_zeros(int(sample.max()) + 1, 3).index_add(0, sample, split)


def test_whole_numbers_among_the_arguments_decide() -> None:
    """Others are captured again, and an argument that decides nothing is data."""
    model, x = Pooled().double(), r(4, 3)
    hd = fomoh_fx.transform(model, lambda output, weight: (output * weight).square().mean())
    for sample, traced in (([0, 0, 1, 1], 1), ([0, 1, 1, 2], 2), ([0, 0, 1, 1], 2)):
        weight = torch.arange(3 * (sample[-1] + 1)).reshape(-1, 3)
        problem = Problem(model, (x, torch.tensor(sample)), loss=hd.loss, targets=(weight,))
        check_call(hd, problem)
        assert len(hd._traced) == traced
        assert "sample" in [what.name for what, _ in hd.latest.program.constants]
        assert not any(what.name.startswith("targets") for what, _ in hd.latest.program.constants)


class Resized(nn.Module):
    """One argument decides a size that a frontend leaves open and a rule does not, another decides nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 2, 3, 3))

    def forward(self, shape: Tensor, mask: Tensor) -> Tensor:
        height, width = shape.tolist()
        resized = nn.functional.interpolate(self.positions, size=(height, width), mode="bilinear", antialias=True)
        return resized.square().flatten(1) * mask[: 2 * height * width]


def test_an_argument_that_decides_a_size_is_told_from_one_that_does_not() -> None:
    model, mask = Resized().double(), torch.arange(16) > 2
    hd = fomoh_fx.transform(model, lambda output: output.sum())
    for shape, traced in (([2, 4], 1), ([2, 2], 2), ([2, 4], 2)):
        check_call(hd, Problem(model, (torch.tensor(shape), mask), loss=hd.loss))
        assert len(hd._traced) == traced
        assert [what.name for what, _ in hd.latest.program.constants] == ["shape"]


@pytest.mark.parametrize("where", ["buffer", "closure"])
def test_constants_that_the_model_changes_through_a_view(where: str) -> None:
    held = torch.tensor([1, 2, 3])

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counts = nn.Buffer(held.clone())

        def forward(self, x: Tensor) -> Tensor:
            counts = self.counts if where == "buffer" else held
            counts[1:].add_(1)
            return (x.sin() * counts).sum() if (torch.arange(3) > 1).any() else x.sum()

    model, x = Counting(), r(3)
    hd = fomoh_fx.transform(model, wrt="inputs")
    for k in range(1, 4):
        out = hd(x, tangents=[torch.eye(3).double()])
        counts = torch.tensor([1, 2 + k, 3 + k])
        torch.testing.assert_close(out.tangent, x.cos() * counts)
        assert (model.counts if where == "buffer" else held).equal(counts) and len(hd._traced) == 1


def test_one_tensor_equals_itself() -> None:
    def distances(x: Tensor, y: Tensor) -> Tensor:
        return (x - x.flip(0)).square() if torch.equal(x, x) and not y.equal(x) else x

    check(distances, Sample((r(3), r(2))))


def test_tensors_of_a_closure_decide_one_after_the_other() -> None:
    edges, sample, kept = torch.tensor([[0, 1, 2], [1, 2, 0]]), torch.tensor([0, 0, 1]), torch.tensor([True, False])

    def pooled(x: Tensor) -> Tensor:
        y = x.new_zeros(int(edges.max()) + 1).index_add(0, edges[1], x[edges[0]].sin())
        return y.new_zeros(int(sample.max()) + 1).index_add(0, sample, y.exp())[kept]

    check(pooled, Sample((r(3),)))


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor, sample: Tensor) -> Tensor:
        y = self.norm(self.layer(x)).sin()
        return x.new_zeros(int(sample.max()) + 1, 3).index_add(0, sample, y)


def test_running_statistics_are_no_constants() -> None:
    model = Normalised().double()
    hd = fomoh_fx.transform(model, lambda output: output.square().mean())
    for number in (1, 2):
        check_call(hd, Problem(model, (r(4, 3), torch.tensor([0, 0, 1, 1])), loss=hd.loss))
        assert len(hd._traced) == 1 and model.norm.num_batches_tracked == number


def changed_in_a_list(x: Tensor) -> Tensor:
    scale = torch.zeros(3, dtype=x.dtype)
    torch._foreach_add_([scale], [x.detach()])
    return x.sin() if scale.sum() > 0 else x.cos()


def test_what_is_changed_in_a_list_is_data() -> None:
    with pytest.raises(CaptureError, match="values of tensors decide"):
        fomoh_fx.transform(changed_in_a_list, wrt="inputs")(r(3), tangents=[r(2, 3)])


class Forces(Normalised):
    """A derivative inside, as of the energy of atoms."""

    def forward(self, x: Tensor, sample: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.layer(x).sin().sum(), x, create_graph=True)
        return x.new_zeros(int(sample.max()) + 1, 3).index_add(0, sample, force)


def test_whole_numbers_decide_beside_a_derivative_inside() -> None:
    model = Forces().double()
    hd = fomoh_fx.transform(model, lambda output: output.square().mean(), wrt="layer.weight")
    given = {"layer.weight": r(2, 3, 3)}
    for sample in ([0, 0, 1, 1], [0, 1, 1, 2]):
        x, sample = r(4, 3), torch.tensor(sample)
        out = hd(x, sample, tangents=given)
        loss = hd.loss(model(x, sample))
        (slope,) = torch.autograd.grad(loss, model.layer.weight)
        torch.testing.assert_close(out.primal, loss.detach())
        torch.testing.assert_close(out.tangent, (given["layer.weight"] * slope).sum((1, 2)))


def test_not_a_number_in_a_constant_is_not_captured_again() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.Buffer(torch.tensor([float("nan"), 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x.sin() if self.scales[1] > 1 else x.cos()

    hd = fomoh_fx.transform(Scaled(), wrt="inputs")
    for _ in range(2):
        hd(r(3), tangents=[r(2, 3)])
    assert len(hd._traced) == 1


def a_rotation(x: Tensor, angle: Tensor) -> Tensor:
    c, s = angle.cos(), angle.sin()
    return x @ torch.tensor([[c, -s], [s, c]]) * torch.as_tensor([angle, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_that_are_written_out_have_their_values_and_no_derivative(dtype: torch.dtype) -> None:
    hd = fomoh_fx.transform(a_rotation, wrt="inputs")
    x, v = torch.randn(3, 2, dtype=dtype), torch.randn(1, 3, 2, dtype=dtype)
    for angle in torch.rand(2, dtype=dtype):
        out = hd(x, angle, tangents=(v, torch.ones(1, dtype=dtype)))
        torch.testing.assert_close(out.primal, a_rotation(x, angle))
        torch.testing.assert_close(out.tangent[0], a_rotation(v[0], angle))


def test_numbers_beside_them_keep_their_kind() -> None:
    def f(x: Tensor) -> Tensor:
        count = torch.tensor([x.detach().sum().long(), 3])
        assert count.dtype == torch.int64
        return x * count.sum() * torch.tensor([x[0], True, 1], dtype=torch.float32)

    x = torch.tensor([2.5, 1.0, 4.0])
    out = fomoh_fx.transform(f, wrt="inputs")(x, tangents=(torch.ones(1, 3),))
    torch.testing.assert_close(out.primal, f(x))


class Windowed(torch.autograd.Function):
    """Branches and loops on its first argument, forward and backward, and on what it makes of it."""

    @staticmethod
    def forward(ctx: Any, ends: Tensor, x: Tensor) -> Tensor:
        steps = torch.arange(0, 4) * ends[1]
        y = x * 0
        for low, high in zip(steps[:-1], steps[1:], strict=True):
            y = y + (x[int(low) : int(high)].sin().sum() if high > low else x.cos().sum())
        ctx.save_for_backward(x, ends)
        return y.sum() * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        x, ends = ctx.saved_tensors
        n = int(3 * ends[1])
        inside = torch.cat([x[:n].cos(), 0 * x[n:]])
        return None, g * len(x) * x[:n].sin().sum() + inside * len(x) * (g * x).sum()


def same_as_windowed(ends: Tensor, x: Tensor) -> Tensor:
    return len(x) * x[: 3 * int(ends[1])].sin().sum() * x


class WritingThere(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, calls: Tensor) -> Tensor:
        calls.add_(1)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class WithEnds(nn.Module):
    """The same with a buffer."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call, self.ends = call, nn.Buffer(torch.tensor([0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.ends, x.exp()).square().sum()


def test_a_function_may_branch_on_what_is_known() -> None:
    x, v = r(7), r(2, 7)
    written = fomoh_fx.transform(lambda x: Windowed.apply(torch.tensor([0, 2]), x.exp()).square().sum(), wrt="inputs")
    module = WithEnds(Windowed.apply)
    kept = fomoh_fx.transform(module, wrt="inputs")
    for end in (2, 1):
        module.ends.copy_(torch.tensor([0, end]))
        for hd, truth in ((kept, WithEnds(same_as_windowed)), (written, WithEnds(same_as_windowed))):
            if hd is kept:
                truth.ends.copy_(module.ends)
            out, (_, slopes, plane) = hd(x, tangents=[v]), reverse_over_reverse(truth, [x], [v])
            assert relative_error(out.tangent, slopes) < 1e-12
            assert relative_error(out.hessian(), plane) < 1e-12


def test_a_buffer_that_a_function_does_not_get_is_no_constant() -> None:
    module = WithEnds(Windowed.apply)
    module.calls, module.scale = nn.Buffer(torch.tensor([3])), nn.Buffer(torch.tensor([0.5]))
    hd, x, v = fomoh_fx.transform(module, wrt="inputs"), r(7), r(2, 7)
    for _ in range(2):
        hd(x, tangents=[v])
        module.calls += 1
        module.scale *= 2
    assert len(hd._traced) == 1


def test_a_function_that_changes_what_is_known_is_refused() -> None:
    with pytest.raises(FomohError, match="WritingThere changes its arguments in place"):
        fomoh_fx.transform(lambda x: WritingThere.apply(x, torch.tensor([0])), wrt="inputs")(r(3), tangents=[r(2, 3)])
