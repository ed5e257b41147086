"""The public face of transform(): what goes in, what comes out, and what a transformed model shares with the model."""

from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fomoh_fx
from fomoh_fx import ArgumentError, transform
from fomoh_fx.hyperdual import Components
from tests.oracle import relative_error, reverse_over_reverse


def r(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.second(torch.tanh(self.first(x) * scale))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def directions(model: nn.Module, k: int = 2, only: tuple[str, ...] = ()) -> dict[str, Tensor]:
    return {n: torch.randn(k, *p.shape, dtype=p.dtype) for n, p in model.named_parameters() if not only or n in only}


def truth(
    model: nn.Module, loss: Any, x: Any, tangents: dict[str, Tensor], *targets: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Reverse-over-reverse in the named parameters."""
    named = dict(model.named_parameters(remove_duplicate=False))

    def function(*values: Tensor) -> Tensor:
        output = torch.func.functional_call(model, dict(zip(tangents, values, strict=True)), (x,))
        return output if loss is None else loss(output, *targets)

    return reverse_over_reverse(function, [named[n] for n in tangents], list(tangents.values()))


def listed(crosses: Tensor, k: int, second_order: str) -> Tensor:
    """The oracle's [K, K, ...] in the order of the components."""
    pairs = torch.stack([crosses[i, j] for i, j in Components(k, second_order).pairs])  # type: ignore[arg-type]
    return pairs.sum(0) if second_order == "trace" else pairs


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    return actual.shape == expected.shape and relative_error(actual, expected) < tolerance


# --- components


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace", None])
@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_every_k_and_second_order(net: Net, k: int, second_order: Any) -> None:
    x, y, tangents = r(5, 3), torch.tensor([0, 1, 1, 0, 1]), directions(net, k)
    out = transform(net, F.cross_entropy, second_order=second_order)(x, tangents=tangents, targets=(y,))
    value, slopes, crosses = truth(net, F.cross_entropy, x, tangents, y)
    assert close(out.primal, value) and close(out.tangent, slopes) and close(out.output, net(x))
    if second_order is None:
        assert out.cross is None
    else:
        assert close(out.cross, listed(crosses, k, second_order))


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
def test_output_without_loss(net: Net, second_order: Any) -> None:
    x, tangents = r(2, 3), directions(net, 3)
    out = transform(net, second_order=second_order)(x, tangents=tangents)
    value, slopes, crosses = truth(net, None, x, tangents)
    assert (
        close(out.primal, value) and close(out.tangent, slopes) and close(out.cross, listed(crosses, 3, second_order))
    )
    assert out.output is None


def test_properties_of_the_result(net: Net) -> None:
    x, one, two = r(5, 3), directions(net, 1), directions(net, 2)
    loss = nn.Softplus()
    plane = transform(net, lambda y: loss(y).sum())
    a, b = plane(x, tangents=one), plane(x, tangents=two)
    assert a.real is a.primal and torch.equal(a.eps1, a.tangent[0]) and torch.equal(a.eps2, a.tangent[0])
    assert torch.equal(a.eps1eps2, a.cross[0]) and torch.equal(a.hessian(), a.cross.reshape(1, 1))
    assert (
        torch.equal(b.eps1, b.tangent[0]) and torch.equal(b.eps2, b.tangent[1]) and torch.equal(b.eps1eps2, b.cross[1])
    )
    assert torch.equal(b.hessian(), b.cross[torch.tensor([[0, 1], [1, 2]])])
    three = plane(x, tangents=directions(net, 3))
    assert three.hessian().shape == (3, 3) and torch.equal(three.hessian(), three.hessian().T)
    with pytest.raises(ArgumentError, match="^eps1: .*not 3"):
        _ = three.eps1
    for second_order in ("trace", "diagonal", None):
        with pytest.raises(ArgumentError, match="^second_order: hessian"):
            transform(net, second_order=second_order)(x, tangents=two).hessian()  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="^second_order: eps1eps2"):
        _ = transform(net, second_order=None)(x, tangents=one).eps1eps2


# --- curvature


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize("loss", [F.cross_entropy, lambda z, y: (z.square().sum(-1) ** 2).mean() + z.sum()])
def test_gauss_newton(net: Net, loss: Any, second_order: Any) -> None:
    x, y, k = r(5, 3), torch.tensor([0, 1, 1, 0, 1]), 3
    tangents = directions(net, k)
    out = transform(net, loss, curvature="ggn", second_order=second_order)(x, tangents=tangents, targets=(y,))
    parameters = dict(net.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,)).flatten())(parameters)
    j = torch.cat([jacobian[n].flatten(1) for n in parameters], 1)
    h = torch.func.hessian(lambda z: loss(z.reshape(5, 2), y))(net(x).flatten())
    v = torch.cat([tangents[n].flatten(1) for n in parameters], 1)
    expected = v @ j.T @ h @ j @ v.T
    _, slopes, crosses = truth(net, loss, x, tangents, y)
    assert close(out.tangent, slopes) and close(out.cross, listed(expected, k, second_order))
    assert not torch.allclose(expected, crosses)


def test_gauss_newton_of_first_order_only(net: Net) -> None:
    out = transform(net, F.mse_loss, curvature="ggn", second_order=None)(
        r(5, 3), tangents=directions(net), targets=(r(5, 2),)
    )
    assert out.cross is None and out.tangent.shape == (2,)


# --- wrt


def test_wrt_a_pattern_and_names(net: Net) -> None:
    x, tangents = r(5, 3), directions(net)
    weights = {n: v for n, v in tangents.items() if n.endswith("weight")}
    _, slopes, crosses = truth(net, torch.sum, x, weights)
    for wrt in ("*.weight", ["first.weight", "second.weight"], ("first.*", "second.weight")):
        out = transform(net, torch.sum, wrt=wrt)(x, tangents=weights)
        assert close(out.tangent, slopes) and close(out.hessian(), crosses)


def test_a_name_left_out_or_none_is_inactive(net: Net) -> None:
    x, tangents = r(5, 3), directions(net, only=("second.weight",))
    _, slopes, crosses = truth(net, torch.sum, x, tangents)
    hd = transform(net, torch.sum)
    for given in (tangents, {**tangents, "first.weight": None}):
        out = hd(x, tangents=given)
        assert close(out.tangent, slopes) and close(out.hessian(), crosses)


def test_order_of_names_does_not_matter(net: Net) -> None:
    x, tangents = r(5, 3), directions(net)
    hd = transform(net, torch.sum)
    first = hd(x, tangents=tangents)
    second = hd(x, tangents=dict(reversed(tangents.items())))
    assert torch.equal(first.cross, second.cross)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()).sum()


def test_tied_weights() -> None:
    model, x = Tied().double(), r(4, 3)
    v = r(2, 3, 3)
    _, slopes, crosses = truth(model, None, x, {"a.weight": v})
    hd = transform(model)
    for name in ("a.weight", "b.weight"):
        out = hd(x, tangents={name: v})
        assert close(out.tangent, slopes) and close(out.hessian(), crosses)
    for wrt in ("b.*", ["b.weight"]):
        assert close(transform(model, wrt=wrt)(x, tangents={"b.weight": v}).hessian(), crosses)
    with pytest.raises(ArgumentError, match="^tangents: 'b.weight' and 'a.weight' are one tied parameter"):
        hd(x, tangents={"a.weight": v, "b.weight": v})


def test_wrt_inputs(net: Net) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x.sin() @ y).sum()

    x, y, v, w = r(2, 3), r(3, 2), r(2, 2, 3), r(2, 3, 2)
    _, slopes, crosses = reverse_over_reverse(function, [x, y], [v, w])
    hd = transform(function, wrt="inputs")
    for out in (hd(x, y, tangents=(v, w)), hd(x, y, tangents=[v, w]), hd(x, y, tangents={"y": w, "x": v}),
                hd(x, y=y, tangents={"y": w, "x": v})):  # fmt: skip
        assert close(out.tangent, slopes) and close(out.hessian(), crosses)
    _, slopes, crosses = reverse_over_reverse(lambda y: function(x, y), [y], [w])
    for out in (hd(x, y, tangents=(None, w)), hd(x, y, tangents={"y": w})):
        assert close(out.tangent, slopes) and close(out.hessian(), crosses)


def test_one_tensor_given_twice_is_two_inputs() -> None:
    x, v, w = r(3), r(2, 3), r(2, 3)
    hd = transform(lambda a, b: (a.sin() * b).sum(), wrt="inputs")
    _, slopes, crosses = reverse_over_reverse(lambda a, b: (a.sin() * b).sum(), [x, x], [v, w])
    out = hd(x, x, tangents=(v, w))
    assert close(out.tangent, slopes) and close(out.hessian(), crosses)
    assert close(hd(x, 2 * x, tangents=(v, w)).primal, (x.sin() * 2 * x).sum())


def test_target_that_was_the_input_may_be_another_tensor_later(net: Net) -> None:
    model = nn.Linear(3, 3).double()
    hd, x, y, tangents = transform(model, F.mse_loss), r(4, 3), r(4, 3), directions(model)
    hd(x, tangents=tangents, targets=(x,))
    assert close(hd(x, tangents=tangents, targets=(y,)).primal, F.mse_loss(model(x), y))


def test_parameter_given_as_an_argument(net: Net) -> None:
    hd, tangents = transform(net, torch.sum), directions(net)
    given = nn.Parameter(r(4, 3))
    assert close(hd(given, tangents=tangents).primal, net(given).sum())
    square = nn.Linear(3, 3, bias=False).double()
    hd, v = transform(square, torch.sum), {"weight": r(1, 3, 3)}
    assert close(hd(square.weight, tangents=v).cross, torch.zeros(1, dtype=torch.float64))
    x = r(3, 3)
    assert close(hd(x, tangents=v).primal, square(x).sum())


# --- structures


class Point(NamedTuple):
    u: Any
    v: Any


@dataclass
class Result:
    value: Tensor
    more: dict[str, Any]


pytree.register_dataclass(Result)


def test_pytree_inputs_and_outputs() -> None:
    def function(point: Point, batch: dict[str, Any], *rest: Tensor, scale: float) -> Result:
        y = point.u * batch["x"][0] * scale
        return Result(y.sin(), {"rest": (rest[0] ** 2, rest[1].argmax()), "n": 3, "none": None, "v": point.v})

    u, x, a, b = r(2), r(2), r(2), r(2)
    point, batch = Point(u, torch.tensor(1)), {"x": [x], "name": "batch"}
    du, dx, da = r(2, 2), r(2, 2), r(2, 2)
    hd = transform(function, wrt="inputs")
    out = hd(point, batch, a, b, scale=3.0, tangents=(Point(du, None), {"x": [dx], "name": None}, da, None))
    assert isinstance(out.primal, Result) and torch.equal(out.primal.value, (u * x * 3).sin())
    assert isinstance(out.tangent, Result) and isinstance(out.cross, Result)
    y = u * x * 3
    dy = 3 * (du * x + u * dx)
    assert close(out.tangent.value, y.cos() * dy)
    assert close(out.hessian().value[0, 1], -y.sin() * dy[0] * dy[1] + y.cos() * 3 * (du[0] * dx[1] + du[1] * dx[0]))
    assert close(out.tangent.more["rest"][0], 2 * a * da)
    assert close(out.cross.more["rest"][0], 2 * torch.stack([da[0] * da[0], da[0] * da[1], da[1] * da[1]]))
    # leaves without derivative: integers and what is no tensor
    assert out.primal.more["rest"][1] == b.argmax() and out.primal.more["n"] == 3 and out.primal.more["v"] == 1
    for part in (out.tangent.more, out.cross.more):
        assert part["rest"][1] is None and part["n"] is None and part["none"] is None and part["v"] is None


def test_structural_zeros_are_filled() -> None:
    out = transform(lambda x, y: {"a": x * 2, "b": y.exp()}, wrt="inputs")(r(2), r(3), tangents=(r(4, 2), None))
    assert torch.equal(out.cross["a"], torch.zeros(10, 2, dtype=torch.float64))
    assert torch.equal(out.tangent["b"], torch.zeros(4, 3, dtype=torch.float64))
    assert torch.equal(out.cross["b"], torch.zeros(10, 3, dtype=torch.float64))
    trace = transform(lambda x: x * 2, wrt="inputs", second_order="trace")(r(2), tangents=(r(4, 2),))
    assert torch.equal(trace.cross, torch.zeros(2, dtype=torch.float64))


def test_keyword_arguments_and_targets_of_the_model(net: Net) -> None:
    x, tangents = r(5, 3), directions(net)
    hd = transform(net, torch.sum)
    for scale in (0.5, 2.0):
        assert close(hd(x, scale=scale, tangents=tangents).primal, net(x, scale).sum())
    assert close(hd(x=x, tangents=tangents).primal, net(x).sum())

    class WithTargets(Net):
        def forward(self, x: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
            return F.mse_loss(super().forward(x), targets)

    model, y = WithTargets().double(), r(5, 2)
    assert close(transform(model)(x, targets=y, tangents=directions(model)).primal, model(x, y))


def test_several_targets_with_structure(net: Net) -> None:
    def loss(output: Tensor, batch: dict[str, Tensor], weight: float) -> Tensor:
        return weight * (batch["mask"] * (output - batch["y"]).square()).mean()

    x, tangents = r(5, 3), directions(net)
    batch = {"y": r(5, 2), "mask": torch.rand(5, 2, dtype=torch.float64)}
    hd = transform(net, loss)
    for weight in (1.0, 3.0):
        out = hd(x, tangents=tangents, targets=(batch, weight))
        _, slopes, crosses = truth(net, loss, x, tangents, batch, weight)
        assert close(out.tangent, slopes) and close(out.hessian(), crosses)


def test_loss_with_buffers(net: Net) -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 0.8], dtype=torch.float64))
    x, y, tangents = r(5, 3), torch.tensor([0, 1, 1, 0, 1]), directions(net)
    hd = transform(net, loss)
    for _ in range(2):
        out = hd(x, tangents=tangents, targets=(y,))
        value, slopes, crosses = truth(net, loss, x, tangents, y)
        assert close(out.primal, value) and close(out.tangent, slopes) and close(out.hessian(), crosses)
        loss.weight.mul_(torch.tensor([3.0, 0.5], dtype=torch.float64))
    assert not any("loss" in name for name in hd.state_dict())


# --- dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_component_keeps_the_dtype(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    x, y, tangents = r(5, 3, dtype=dtype), torch.tensor([0, 1, 1, 0, 1]), directions(model)
    out = transform(model, F.cross_entropy)(x, tangents=tangents, targets=(y,))
    assert {out.primal.dtype, out.tangent.dtype, out.cross.dtype, out.output.dtype} == {dtype}
    wide = copy.deepcopy(model).double()
    _, slopes, crosses = truth(wide, F.cross_entropy, x.double(), {n: v.double() for n, v in tangents.items()}, y)
    tolerance = 30 * torch.finfo(dtype).eps
    assert close(out.tangent.double(), slopes, tolerance) and close(out.hessian().double(), crosses, tolerance)


def test_complex_parameters() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(self.weight @ x).exp()

    model, x = Model(), torch.randn(3, 2, dtype=torch.complex64) / 4
    tangents = directions(model)
    out = transform(model)(x, tangents=tangents)
    assert {out.primal.dtype, out.tangent.dtype, out.cross.dtype} == {torch.complex64}
    y = torch.fft.fft(model.weight @ x).exp()
    dy = torch.fft.fft(tangents["weight"] @ x)
    assert close(out.tangent, y * dy, 1e-5) and close(out.hessian()[0, 1], y * dy[0] * dy[1], 1e-5)


# --- what hd shares with the model


def test_state_is_the_models_own() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))
    hd = transform(model, torch.sum)
    for other in (hd, fomoh_fx.compile(hd)):
        assert list(other.state_dict()) == list(model.state_dict())
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in model.named_parameters()]
        assert all(a is b for a, b in zip(other.parameters(), model.parameters(), strict=True))
        assert all(a is b for a, b in zip(other.buffers(), model.buffers(), strict=True))
    hd.load_state_dict({n: torch.ones_like(v) for n, v in model.state_dict().items()})
    assert all((p == 1).all() for p in model.parameters())


def test_optimizer_step_gives_new_values(net: Net) -> None:
    x, tangents = r(5, 3), directions(net)
    hd = transform(net, torch.sum)
    optimizer = torch.optim.SGD(hd.parameters(), lr=0.1)
    for _ in range(3):
        out = hd(x, tangents=tangents)
        _, slopes, crosses = truth(net, torch.sum, x, tangents)
        assert close(out.tangent, slopes) and close(out.hessian(), crosses)
        net.zero_grad()
        net(x).sum().backward()
        optimizer.step()


def test_parameter_replaced_after_the_first_call(net: Net) -> None:
    x, tangents = r(5, 3), directions(net)
    hd = transform(net, torch.sum)
    hd(x, tangents=tangents)
    net.first.weight = nn.Parameter(r(4, 3))
    assert close(hd(x, tangents=tangents).primal, net(x).sum())


def test_to_and_train_respecialise_and_act_on_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    hd, x = transform(model, lambda y: y.square().sum()), torch.randn(5, 3)
    hd.train()
    single = hd(x, tangents=directions(model))
    hd.to(torch.float64)
    assert model[0].weight.dtype == torch.float64 and model[1].running_mean.dtype == torch.float64
    double = hd(x.double(), tangents=directions(model))
    assert single.primal.dtype == torch.float32 and double.primal.dtype == torch.float64
    hd.eval()
    assert not model.training and not model[1].training
    out = hd(x.double(), tangents=directions(model))
    assert close(out.primal, model(x.double()).square().sum()) and not close(out.primal, double.primal)
    model.train()
    before = model[1].num_batches_tracked.item()
    hd(x.double(), tangents=directions(model))
    assert model[1].num_batches_tracked.item() == before + 1
    assert hd.training == model.training


def test_submodule_flags_respecialise() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)).double().train()
    hd, x, tangents = transform(model, lambda y: y.square().sum()), r(5, 3), directions(model)
    hd(x, tangents=tangents)
    model[1].eval()
    before = [model[i].running_mean.clone() for i in (1, 2)]
    hd(x, tangents=tangents)
    assert torch.equal(model[1].running_mean, before[0]) and not torch.equal(model[2].running_mean, before[1])


def test_buffers_are_updated_once_from_the_primal() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4)).double()
    reference, x = copy.deepcopy(model), r(6, 3)
    hd, tangents = transform(model, torch.sum), directions(model, 3)
    for _ in range(2):
        hd(x, tangents=tangents)
        reference(x)
        for (name, a), b in zip(model.named_buffers(), reference.buffers(), strict=True):
            assert close(a.double(), b.double(), 1e-12), name


def test_tracing_updates_no_buffer() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    before = copy.deepcopy(model.state_dict())
    transform(model, torch.sum).trace(r(6, 3), tangents=directions(model))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_argument_that_the_model_changes_is_changed() -> None:
    def function(x: Tensor, memory: Tensor) -> Tensor:
        memory.add_(x)
        return memory.sin()

    x, memory, v = r(3), r(3), r(1, 3)
    total = x + memory
    out = transform(function, wrt="inputs")(x, memory, tangents=(v, None))
    assert close(memory, total) and close(out.tangent, total.cos() * v)


def test_function_over_a_module(net: Net) -> None:
    x, v = r(5, 3), r(2, 5, 3)
    hd = transform(lambda x: net(x).sum(), wrt="inputs")
    for _ in range(2):
        _, slopes, crosses = reverse_over_reverse(lambda x: net(x).sum(), [x], [v])
        out = hd(x, tangents=(v,))
        assert close(out.tangent, slopes) and close(out.hessian(), crosses)
        with torch.no_grad():
            net.first.weight.mul_(1.5)
    net.first.weight = nn.Parameter(r(4, 3))
    assert close(hd(x, tangents=(v,)).primal, net(x).sum())


def test_function_over_a_module_sees_its_mode_and_dtype() -> None:
    inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    hd, x = transform(lambda x: inner(x).square().sum(), wrt="inputs"), torch.randn(5, 3)
    hd(x, tangents=(torch.randn(1, 5, 3),))
    assert inner[1].num_batches_tracked == 1
    inner.eval()
    out = hd(x, tangents=(torch.randn(1, 5, 3),))
    assert close(out.primal, inner(x).square().sum(), 1e-5) and inner[1].num_batches_tracked == 1


def test_function_over_a_tensor_sees_its_later_values() -> None:
    weight = r(3)
    hd, x = transform(lambda x: (x * weight).exp().sum(), wrt="inputs"), r(3)
    for _ in range(2):
        out = hd(x, tangents=(torch.eye(3, dtype=torch.float64),))
        assert close(out.tangent, weight * (x * weight).exp())
        weight.mul_(2)


# --- specialisation


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every capture is counted."""
    calls: list[Any] = []
    module = sys.modules["fomoh_fx.transform"]  # the package has the function of that name
    original = module.capture

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "capture", counted)
    return calls


def test_one_capture_for_each_signature(net: Net, captures: list[Any]) -> None:
    hd = transform(net, F.mse_loss)

    def call(n: int = 5, k: int = 2, only: tuple[str, ...] = (), **kwargs: Any) -> None:
        hd(r(n, 3), tangents=directions(net, k, only), targets=(r(n, 2),), **kwargs)

    variants: list[dict[str, Any]] = [{}, {"n": 6}, {"k": 3}, {"only": ("first.bias",)}, {"scale": 2.0}]
    for count, variant in enumerate(variants, 1):
        call(**variant)
        call(**variant)
        assert len(captures) == count
    net.eval()
    call()
    assert len(captures) == len(variants) + 1
    net.train()
    call()
    assert len(captures) == len(variants) + 1


def test_trace_does_not_run_and_the_call_reuses_it(captures: list[Any], net: Net) -> None:
    hd, x, tangents = transform(net, torch.sum), r(5, 3), directions(net)
    hd.trace(x, tangents=tangents)
    hd(x, tangents=tangents)
    assert len(captures) == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_under_every_grad_mode(net: Net, context: Any) -> None:
    x, tangents = r(5, 3), directions(net)
    _, slopes, crosses = truth(net, torch.sum, x, tangents)
    hd = transform(net, torch.sum)
    with context():
        out = hd(x, tangents=tangents)
    assert close(out.tangent, slopes) and close(out.hessian(), crosses)
    assert not out.primal.requires_grad
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    net(x).sum().backward()  # the model still trains by reverse mode


def test_frozen_parameters_may_have_tangents(net: Net) -> None:
    x, tangents = r(5, 3), directions(net)
    _, slopes, crosses = truth(net, torch.sum, x, tangents)
    net.requires_grad_(False)
    out = transform(net, torch.sum)(x, tangents=tangents)
    assert close(out.tangent, slopes) and close(out.hessian(), crosses)


# --- what depends on data: the graph holds for every value, or it is refused (test_errors.py)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x[x > 0] ** 3).sum(),
        lambda x: x[x[:, 0].nonzero().squeeze(-1)].sin().sum(),
        lambda x: (x * x * x.max().item()).sum(),  # a number stops tangents
        lambda x: (x**3 * sum(x[0].tolist())).sum(),
    ],
    ids=["mask", "nonzero", "item", "tolist"],
)
def test_sizes_and_numbers_from_data(function: Any, captures: list[Any]) -> None:
    hd = transform(function, wrt="inputs")
    for zeros in range(3):
        x, v = r(4, 3), r(2, 4, 3)
        x[:zeros] = 0
        _, slopes, crosses = reverse_over_reverse(function, [x], [v])
        out = hd(x, tangents=(v,))
        assert close(out.tangent, slopes) and close(out.hessian(), crosses)
    assert len(captures) == 1


# --- randomness


def _dropout_masks(hd: Any, model: nn.Module) -> None:
    """Fresh at every call, one mask for the value and for every component, reproducible by a seed."""
    x, tangents = torch.ones(1, 64), {"0.weight": torch.ones(2, 64, 64)}
    outs = [hd(x, tangents=tangents) for _ in range(2)]
    for out in outs:
        dropped = out.primal == 0
        assert dropped.any() and not dropped.all()
        assert torch.equal(out.tangent[0] == 0, dropped) and torch.equal(out.tangent[1] == 0, dropped)
    assert not torch.equal(outs[0].primal, outs[1].primal)
    torch.manual_seed(3)
    first = hd(x, tangents=tangents).primal
    torch.manual_seed(3)
    assert torch.equal(hd(x, tangents=tangents).primal, first)


def test_dropout_masks() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5))
    _dropout_masks(transform(model), model)


@pytest.mark.slow
def test_dropout_masks_compiled() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5))
    _dropout_masks(fomoh_fx.compile(transform(model)), model)


# --- copies


def test_deepcopy_and_pickle(net: Net) -> None:
    hd, x, tangents = transform(net, F.mse_loss), r(5, 3), directions(net)
    expected = hd(x, tangents=tangents, targets=(r(5, 2) * 0,))
    for other in (copy.deepcopy(hd), pickle.loads(pickle.dumps(hd))):
        out = other(x, tangents=tangents, targets=(r(5, 2) * 0,))
        assert torch.equal(out.cross, expected.cross)
        with torch.no_grad():
            other.first.weight.zero_()
        assert net.first.weight.abs().sum() > 0 and other.model.first.weight.abs().sum() == 0
        assert not close(other(x, tangents=tangents, targets=(r(5, 2) * 0,)).primal, expected.primal)


def test_settings_of_a_module_are_part_of_the_signature() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.LeakyReLU(0.1))
    hd, x = transform(net), torch.randn(5, 3)
    tangents = {"0.weight": torch.randn(1, 4, 3)}
    for slope in (0.1, 0.3, 0.1):
        net[2].negative_slope = slope
        assert close(hd(x, tangents=tangents).primal, net(x), 1e-6)
    assert len(hd._traced) == 2
    net[1].p = 1.0
    assert not hd(x, tangents=tangents).primal.any()


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize("loss", [None, nn.functional.mse_loss])
def test_without_first_derivatives(second_order, loss):
    """The second ones are the same, and what only the first ones need is gone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    tangents = {name: torch.randn(2, *p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    keywords = {"tangents": tangents, **({} if loss is None else {"targets": (y,)})}
    both = fomoh_fx.transform(model, loss, second_order=second_order)
    alone = fomoh_fx.transform(model, loss, second_order=second_order, first_order=False)
    expected, found = both(x, **keywords), alone(x, **keywords)
    assert found.tangent is None
    torch.testing.assert_close(found.cross, expected.cross, rtol=0, atol=0)
    torch.testing.assert_close(found.primal, expected.primal, rtol=0, atol=0)
    counts = [len(hd.stages["eliminate"].graph.nodes) for hd in (alone, both)]
    assert counts[0] < counts[1]
    assert fomoh_fx.compile(alone).first_order is False


def test_first_order_is_all_there_is():
    with pytest.raises(fomoh_fx.ArgumentError, match="first_order: "):
        fomoh_fx.transform(lambda x: x, wrt="inputs", second_order=None, first_order=False)


def test_an_optimizer_takes_first_derivatives_all_the_same():
    model = nn.Linear(3, 1)
    hd = fomoh_fx.transform(model, nn.functional.mse_loss, first_order=False)
    opt = fomoh_fx.optim.FoMoHKD(hd, lr=0.5, seed=0)
    x = torch.randn(8, 3)
    losses = [opt.step(x, targets=(x.sum(1, keepdim=True),)).item() for _ in range(20)]
    assert losses[-1] < losses[0]


def test_what_was_asked_for_stays():
    hd = fomoh_fx.transform(lambda x: x.sin().sum(), wrt="inputs")
    for name, value in {"second_order": "trace", "curvature": "ggn", "wrt": "parameters", "first_order": False}.items():
        with pytest.raises(fomoh_fx.ArgumentError, match=f"^{name}: "):
            setattr(hd, name, value)


@pytest.mark.parametrize("kind", [nn.Parameter, Tensor.detach])
def test_functional_call(kind):
    """With parameters of another place, which may be plain tensors, as ``torch.func`` has them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    hd = fomoh_fx.transform(model, lambda y: y.square().sum())
    x = torch.randn(5, 3, dtype=torch.float64)
    tangents = {name: torch.randn(1, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    for factor in (2.0, 3.0):
        given = {name: kind(p.detach() * factor) for name, p in model.named_parameters()}
        found = torch.func.functional_call(hd, given, (x,), {"tangents": tangents})
        other = copy.deepcopy(model)
        other.load_state_dict(given)
        expected = fomoh_fx.transform(other, lambda y: y.square().sum())(x, tangents=tangents)
        torch.testing.assert_close(found.tangent, expected.tangent)
        torch.testing.assert_close(found.cross, expected.cross)
