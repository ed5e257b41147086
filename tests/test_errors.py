"""Bad input, and models that have no exact expansion, get an error that says what, where and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fomoh_fx
from fomoh_fx import ArgumentError, CaptureError, SpecialisationError, UnsupportedOpError, transform


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("offset", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.offset


def tangents(k: int = 2) -> dict[str, Tensor]:
    return {"layer.weight": torch.randn(k, 2, 3), "layer.bias": torch.randn(k, 2)}


X = torch.ones(4, 3)
Y = torch.ones(4, 2)


# --- transform's own arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "^model: expected a module or a function, got int"),
        ({"loss": 1.0}, r"^loss: expected a function of \(output, \*targets\), got float"),
        ({"second_order": "full"}, "^second_order: expected one of .*'plane'.*got 'full'"),
        ({"second_order": True}, "^second_order: expected one of"),
        ({"second_order": ["plane"]}, "^second_order: expected one of"),
        ({"curvature": "fisher"}, "^curvature: expected 'hessian' or 'ggn', got 'fisher'"),
        ({"curvature": "ggn"}, "^curvature: 'ggn' needs loss="),
        ({"wrt": "*.kernel"}, r"^wrt: no parameter matches '\*\.kernel'; there are layer.weight, layer.bias"),
        ({"wrt": ["layer.weight", "head.*"]}, r"^wrt: no parameter matches 'head\.\*'"),
        ({"wrt": []}, "^wrt: selects no parameter"),
        ({"wrt": 3}, "^wrt: expected"),
        ({"wrt": [3]}, "^wrt: expected"),
        ({"wrt": "offset"}, "^wrt: no parameter matches 'offset'"),
    ],
)
def test_arguments_of_transform(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        transform(**{"model": Net(), **arguments})


def test_models_without_parameters() -> None:
    for model in (nn.ReLU(), torch.sin):
        with pytest.raises(ArgumentError, match='^wrt: the model has no parameters.*wrt="inputs"'):
            transform(model)


def test_already_transformed() -> None:
    with pytest.raises(ArgumentError, match="^model: is already transformed"):
        transform(transform(Net()))
    with pytest.raises(ArgumentError, match="^hd: expected the result of fomoh_fx.transform, got Net"):
        fomoh_fx.compile(Net())  # type: ignore[arg-type]


# --- tangents of parameters


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "^tangents: missing"),
        (torch.ones(2, 2, 3), "^tangents: expected a mapping from parameter names, got Tensor"),
        ({}, "^tangents: none is given"),
        ({"layer.weight": None}, "^tangents: none is given"),
        ({"layer.weights": torch.ones(2, 2, 3)}, "^tangents: .*no parameter 'layer.weights'; there are layer.weight"),
        ({"offset": torch.ones(2, 2)}, "^tangents: the model has no parameter 'offset'"),
        ({"layer.weight": torch.ones(2, 3)}, r"^tangents: .*'layer.weight' must have shape \[K, 2, 3\], got \[2, 3\]"),
        ({"layer.weight": torch.ones(2, 3, 2)}, r"^tangents: .*must have shape \[K, 2, 3\], got \[2, 3, 2\]"),
        ({"layer.weight": torch.ones(0, 2, 3)}, r"^tangents: .*'layer.weight' has no direction \(K = 0\)"),
        (
            {"layer.weight": torch.ones(2, 2, 3).double()},
            "^tangents: .*must have dtype torch.float32, got torch.float64",
        ),
        ({"layer.weight": torch.ones(2, 2, 3, device="meta")}, "^tangents: .*must be on cpu, got meta"),
        ({"layer.weight": torch.ones(2, 2, 3).to_sparse()}, "^tangents: .*must be dense"),
        ({"layer.weight": [[1.0]]}, "^tangents: .*'layer.weight' must be a tensor, got list"),
        (
            {"layer.weight": torch.ones(2, 2, 3), "layer.bias": torch.ones(3, 2)},
            "^tangents: K differs: parameter 'layer.weight' has 2 directions, parameter 'layer.bias' has 3",
        ),
    ],
)
def test_tangents_of_parameters(given: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        transform(Net())(X, tangents=given)


def test_tangent_outside_wrt() -> None:
    with pytest.raises(ArgumentError, match=r"^tangents: parameter 'layer.bias' is outside wrt='\*.weight'"):
        transform(Net(), wrt="*.weight")(X, tangents=tangents())


# --- tangents of inputs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.ones(2, 4, 3),), "^tangents: 1 entries for 2 positional arguments"),
        ((None, None), "^tangents: none is given"),
        ((torch.ones(4, 3), None), r"^tangents: .*argument 'x' must have shape \[K, 4, 3\], got \[4, 3\]"),
        (
            (None, torch.ones(2)),
            "^tangents: .*argument 'n' .*must have dtype|^tangents: argument 'n' has dtype torch.int64",
        ),
        (({"x": torch.ones(2, 4, 3)}, None), "^tangents: for argument 'x' they must have the argument's own structure"),
        ({"z": torch.ones(2, 4, 3)}, "^tangents: the call has no argument 'z'; there are x, n"),
        (torch.ones(2, 4, 3), "^tangents: expected a sequence .* or a mapping, got Tensor"),
        (3, "^tangents: expected a sequence .* or a mapping, got int"),
    ],
)
def test_tangents_of_inputs(given: Any, message: str) -> None:
    def function(x: Tensor, n: Tensor) -> Tensor:
        return x.sin() * n

    with pytest.raises(ArgumentError, match=message):
        transform(function, wrt="inputs")(X, torch.tensor(2), tangents=given)


def test_tangent_of_what_is_no_tensor() -> None:
    with pytest.raises(
        ArgumentError, match="^tangents: for argument 'scale' there is one for 2.0, which is not a tensor"
    ):
        transform(lambda x, scale: x * scale, wrt="inputs")(X, 2.0, tangents=(None, torch.ones(2)))


# --- what the model and the loss return


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda z, y: z - y, r"^loss: must return a scalar tensor, got shape \(4, 2\); reduce it"),
        (lambda z, y: (z - y).sum().reshape(1), r"^loss: must return a scalar tensor, got shape \(1,\)"),
        (lambda z, y: 3, "^loss: must return a scalar tensor, got int"),
        (lambda z, y: None, "^loss: must return a scalar tensor, got NoneType"),
        (lambda z, y: {"loss": z.sum()}, "^loss: must return a scalar tensor, got dict"),
        (lambda z, y: z.argmax(), "^loss: must return a real floating-point tensor, got torch.int64"),
        (lambda z, y: torch.fft.fft(z).sum(), "^loss: must return a real floating-point tensor, got torch.complex64"),
    ],
)
def test_what_a_loss_returns(loss: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        transform(Net(), loss)(X, tangents=tangents(), targets=(Y,))


@pytest.mark.parametrize("output", [lambda x: x.argmax(-1), lambda x: 3, lambda x: None, lambda x: {"n": x.shape[0]}])
def test_model_without_floating_point_output(output: Any) -> None:
    with pytest.raises(ArgumentError, match="^model: returns no floating-point tensor"):
        transform(output, wrt="inputs")(X, tangents=(torch.ones(1, 4, 3),))


@pytest.mark.parametrize("wrt", ["parameters", "inputs"])
def test_lazy_modules_have_no_shapes_yet(wrt: str) -> None:
    x, v = torch.randn(2, 3), torch.randn(1, 2, 3)
    model = nn.Sequential(nn.LazyLinear(3))
    hd = fomoh_fx.transform(model, wrt=wrt)
    tangents: Any = (v,) if wrt == "inputs" else {"0.weight": torch.randn(1, 3, 3)}
    with pytest.raises(ArgumentError, match="model: 0.weight has no shape yet; call the model once"):
        hd(x, tangents=tangents)
    model(x)
    assert hd(x, tangents=tangents).tangent.shape == (1, 2, 3)


def test_targets() -> None:
    hd = transform(Net(), F.mse_loss)
    with pytest.raises(ArgumentError, match="^targets: expected a tuple of the loss's arguments, got Tensor"):
        hd(X, tangents=tangents(), targets=Y)
    with pytest.raises(
        ArgumentError, match="^targets: the loss cannot be called like this: missing a required argument: 'target'"
    ):
        hd(X, tangents=tangents())
    with pytest.raises(ArgumentError, match="^targets: the loss .*: too many positional arguments"):
        transform(Net(), lambda z, y: (z - y).sum())(X, tangents=tangents(), targets=(Y, Y))


def test_arguments_of_the_model() -> None:
    hd = transform(Net())
    with pytest.raises(
        ArgumentError, match="^args: the model cannot be called like this: missing a required argument: 'x'"
    ):
        hd(tangents=tangents())
    with pytest.raises(ArgumentError, match="^args: .*: got an unexpected keyword argument 'scale'"):
        hd(X, scale=2, tangents=tangents())


def test_gauss_newton_where_the_loss_is_linear_in_the_output() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(-1))
    hd = transform(model, F.nll_loss, curvature="ggn")
    directions = {n: torch.randn(2, *p.shape) for n, p in model.named_parameters()}
    with pytest.raises(ArgumentError, match="^curvature: .*return logits"):
        hd(X, tangents=directions, targets=(torch.tensor([0, 1, 2, 3]),))


def test_gauss_newton_of_a_parameter_that_is_not_used() -> None:
    model = Net()
    model.register_parameter("spare", nn.Parameter(torch.ones(2)))
    out = transform(model, F.mse_loss, curvature="ggn")(X, tangents={"spare": torch.ones(2, 2)}, targets=(Y,))
    assert torch.equal(out.hessian(), torch.zeros(2, 2)) and torch.equal(out.tangent, torch.zeros(2))


def test_result_that_does_not_hold_what_is_asked() -> None:
    for second_order in ("trace", None):
        out = transform(Net(), torch.sum, second_order=second_order)(X, tangents=tangents())  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=f"^second_order: hessian.*needs.*'plane'.*{second_order}"):
            out.hessian()


def test_nothing_is_compiled_yet() -> None:
    with pytest.raises(SpecialisationError, match="nothing is compiled yet: call the module, or trace it"):
        _ = transform(Net()).code


# --- models that cannot be captured: refused with the user's line, never silently specialised


def refusal(model: Any, *args: Any, error: type[Exception] = CaptureError) -> str:
    with pytest.raises(error) as caught:
        transform(model, wrt="inputs")(*args, tangents=(torch.randn(2, *args[0].shape), *[None] * (len(args) - 1)))
    return str(caught.value)


def branch(x: Tensor) -> Tensor:
    if x.sum() > 0:  # the branch
        return x.sin()
    return x.cos()


def loop(x: Tensor) -> Tensor:
    while x.norm() > 1:  # the loop
        x = x / 2
    return x


def branch_on_a_number(x: Tensor) -> Tensor:
    n = x.max().item()
    return x * n if n > 0 else x / n  # the branch


def size_from_data(x: Tensor) -> Tensor:
    return x.sum() * torch.ones(int(x.abs().sum()))  # the size


def array_from_data(x: Tensor) -> Tensor:
    return x * float(x.detach().numpy().sum())  # the array


@pytest.mark.parametrize(
    "model", [branch, loop, branch_on_a_number, size_from_data, array_from_data], ids=lambda f: f.__name__
)
def test_data_dependent_models(model: Any) -> None:
    message = refusal(model, X.clone())
    assert message.startswith("model: ")
    assert "test_errors.py:" in message, message
    assert "# the " in message, message


def factored(x: Tensor) -> Tensor:
    chosen = x[x > 0]
    matrix = torch.outer(chosen, chosen) + torch.eye(chosen.shape[0])
    return torch.linalg.cholesky(matrix).sum()  # the operator


def test_a_size_from_data_that_an_operator_needs() -> None:
    message = refusal(factored, X.clone(), error=UnsupportedOpError)
    assert "test_errors.py:" in message and "# the operator" in message, message
    assert "the values of tensors decide" in message and "a mask over all cases" in message, message
    assert "register_rule" not in message and "TORCH_LOGS" not in message and "SymNode" not in message, message


@pytest.mark.parametrize("makes_modules", [False, True])
def test_data_dependent_branch_inside_a_module(makes_modules: bool) -> None:
    """A module that is made at every call is no reason, though the error's frames keep it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = nn.Sequential(self.layer)(x) if makes_modules else self.layer(x)
            return y.exp() if y.mean() > 0 else y.sin()  # the branch

    model = Model()
    with pytest.raises(CaptureError, match=r"test_errors\.py:\d+, return y\.exp\(\) if y\.mean\(\) > 0.*# the branch"):
        transform(model)(X, tangents={"layer.bias": torch.ones(1, 2)})


def test_a_models_own_error_names_its_line() -> None:
    def wrong(x: Tensor) -> Tensor:
        return x @ x  # shapes do not fit

    assert "# shapes do not fit" in refusal(wrong, X)


class Looks(nn.Module):
    """Rows of a table, one of them only inside a branch: a number that is no row is an error at run time."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.table, self.branches = nn.Embedding(5, 3), branches

    def forward(self, rows: Tensor) -> Tensor:
        def found(x: Tensor) -> Tensor:
            return self.table(rows).tanh() * x  # the look-up

        if self.branches:
            return torch.cond(rows.sum() > 2, found, lambda x: 2 * x, (torch.ones(2, 3),)).sum()
        return found(torch.ones(2, 3)).sum()


def raised_at_run_time(hd: fomoh_fx.HyperDualModule) -> BaseException:
    tangent = {"table.weight": torch.randn(2, 5, 3)}
    hd(torch.tensor([1, 2]), tangents=tangent)
    with pytest.raises(IndexError, match="out of range") as raised:
        hd(torch.tensor([1, 7]), tangents=tangent)
    return raised.value


@pytest.mark.parametrize("branches", [False, True])
def test_an_error_at_run_time_names_its_line(branches: bool) -> None:
    error = raised_at_run_time(transform(Looks(branches)))
    (note,) = error.__notes__
    assert re.search(
        r"test_errors\.py:\d+, return self\.table.*# the look-up\n.*aten\.embedding\.default, primal", note
    )


@pytest.mark.slow
def test_an_error_of_a_compiled_program_names_its_line() -> None:
    (note,) = raised_at_run_time(fomoh_fx.compile(transform(Looks(True)))).__notes__
    assert "# the look-up" in note


def test_an_error_of_a_loss_that_is_a_function_of_pytorchs() -> None:
    hd = transform(Net(), F.cross_entropy)
    hd(X, tangents=tangents(), targets=(torch.zeros(4, dtype=torch.long),))
    with pytest.raises((RuntimeError, IndexError), match="out of bounds") as raised:
        hd(X, tangents=tangents(), targets=(torch.full((4,), 9),))
    assert "a function of PyTorch's that was given as the model or the loss" in raised.value.__notes__[0]


# --- custom Functions


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.1, 0.1)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


@pytest.mark.parametrize("function", [Clipped, Once])
def test_functions_without_exact_second_derivative(function: Any) -> None:
    def model(x: Tensor) -> Tensor:
        return function.apply(x).sum()  # the call

    message = refusal(model, X, error=UnsupportedOpError)
    assert function.__name__ in message and "linear in the incoming gradient" in message
    assert "test_errors.py:" in message and "# the call" in message


# --- operators without a rule


@pytest.fixture(scope="module")
def library() -> Iterator[Any]:
    lib = torch.library.Library("fomoh_fx_test_errors", "DEF")
    lib.define("shift(Tensor x) -> Tensor")
    lib.impl("shift", lambda x: x + 1, "CompositeExplicitAutograd")
    yield torch.ops.fomoh_fx_test_errors
    lib._destroy()


def test_operator_without_a_rule(library: Any) -> None:
    def model(x: Tensor) -> Tensor:
        return library.shift(x.sin()).sum()  # the operator

    message = refusal(model, X, error=UnsupportedOpError)
    assert message.startswith("operator fomoh_fx_test_errors.shift.default: ")
    assert "test_errors.py:" in message and "# the operator" in message
    assert "fomoh_fx.register_rule(" in message


def test_operator_without_a_rule_where_nothing_is_active(library: Any) -> None:
    out = transform(lambda x, y: (x * library.shift(y)).sum(), wrt="inputs")(X, X, tangents=(torch.ones(1, 4, 3), None))
    assert out.primal == 24 and out.tangent[0] == 24 and out.cross[0] == 0


def test_dtypes_that_do_not_fit() -> None:
    """A rule would not help."""
    a, b = torch.ones(2, 2), torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(UnsupportedOpError, match=r"torch\.float32 and torch\.float64.*cast them to one") as raised:
        transform(torch.mm, wrt="inputs")(a, b, tangents=(a.unsqueeze(0), b.unsqueeze(0)))
    assert "register_rule" not in str(raised.value)


def test_numpy_inside_a_model() -> None:
    def matched(x: Tensor) -> Tensor:
        order = x.detach().numpy().argsort()  # the array
        return x[torch.from_numpy(order)]

    message = refusal(matched, X.clone())
    assert "test_errors.py:" in message and "# the array" in message, message
    assert "compute with torch, or before the call and pass the result as an argument" in message, message
