"""The printed text of a stage: runs on its own, gives the same result, and says where every statement comes from."""

import io
import math
import re

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fomoh_fx
from fomoh_fx.inspect import code, constants, print_readable
from fomoh_fx.inspect.printing import LITERAL, described
from tests.passes.waste import MODELS
from tests.rules.test_control_flow import CASES, r


def executed(module):
    """The function that the printed text defines, in an empty namespace."""
    namespace = {}
    exec(code(module), namespace)
    return namespace["forward"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("second_order", ["plane", "trace"])
def test_the_printed_code_computes_what_the_module_computes(name, second_order):
    torch.manual_seed(0)
    model, args = MODELS[name][0](), MODELS[name][1]
    hd = fomoh_fx.transform(model, second_order=second_order)
    tangents = {n: torch.randn(2, *p.shape) for n, p in model.named_parameters()}
    out = hd(*args, tangents=tangents)
    state = {n.replace(".", "_"): v for n, v in model.named_parameters()}
    state |= {f"{n.replace('.', '_')}_tangent": v for n, v in tangents.items()} | {"src": args[0], "x": args[0]}
    names = [n.name for n in hd.stages["eliminate"].graph.find_nodes(op="placeholder")]
    namespace = {}
    exec(hd.code, namespace)
    with torch.no_grad():
        flat = namespace["forward"](*(state[name] for name in names))
    for printed, value in zip(flat, (out.primal, out.tangent, out.cross), strict=True):
        torch.testing.assert_close(printed, value, rtol=0, atol=0)


@pytest.mark.parametrize("stage", ["capture", "normalize", "expand", "simplify", "cse", "eliminate"])
def test_every_stage_runs(stage):
    model = MODELS["mlp"][0]()
    hd = fomoh_fx.transform(model, nn.CrossEntropyLoss())
    hd.trace(
        *MODELS["mlp"][1], tangents={"inner.bias": torch.randn(3, 5)}, targets=(torch.zeros(6, dtype=torch.int64),)
    )
    module = hd.stages[stage]
    inputs = [
        torch.zeros(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in module.graph.find_nodes(op="placeholder")
    ]
    for printed, value in zip(executed(module)(*inputs), module(*inputs), strict=True):
        torch.testing.assert_close(printed, value, rtol=0, atol=0, equal_nan=True)


def test_every_statement_ends_with_where_it_comes_from():
    model = MODELS["mlp"][0]()
    hd = fomoh_fx.transform(model)
    hd.trace(*MODELS["mlp"][1], tangents={n: torch.randn(3, *p.shape) for n, p in model.named_parameters()})
    text = hd.code
    statements = [line for line in text.splitlines() if " = " in line.partition("#")[0]]
    assert len(statements) == len(
        [n for n in hd.stages["eliminate"].graph.nodes if n.op in ("call_function", "get_attr")]
    )
    pattern = r"  # (primal|(tangent|cross) of \w+) \| \w+\[[\d, ]*\] \| waste\.py:\d+, .+$"
    assert all(re.search(pattern, statement) for statement in statements)
    assert "= None" not in text and ";" not in text
    (tanh,) = [s for s in statements if s.startswith("    tanh_tangent = ")]
    assert tanh.startswith("    tanh_tangent = torch.ops.aten.mul.Tensor(")
    assert "# tangent of tanh | float32[3, 6, 5] | waste.py:" in tanh
    assert tanh.endswith("return torch.tanh(self.inner(x))")


def check(function, *inputs):
    module = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    printed = executed(module)(*inputs, **constants(module))
    torch.testing.assert_close(printed, function(*inputs), rtol=0, atol=0, equal_nan=True)
    return code(module)


@pytest.mark.parametrize(
    "constant",
    [
        torch.tensor([0, 2]),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.tensor([1.0, math.inf, -math.inf, math.nan]),
        torch.tensor([[True], [False]]),
        torch.empty(0, 3),
        torch.tensor([0.1, 1e-300], dtype=torch.float64),
    ],
    ids=str,
)
def test_small_constants_are_literals(constant):
    text = check(lambda x: (x, constant + 0 if constant.dtype is not torch.bool else ~constant), torch.randn(2))
    assert "torch.tensor(" in text or "torch.empty(" in text


@pytest.mark.parametrize(
    "constant", [torch.randn(LITERAL + 1), torch.randn(2, dtype=torch.complex64)], ids=["big", "complex"]
)
def test_other_constants_are_keyword_arguments(constant):
    text = check(lambda x: (x * constant,), torch.randn(constant.shape))
    assert "    *, _tensor_constant0,\n" in text


def test_numbers_devices_and_dtypes_are_imported():
    text = check(lambda x: (x.clamp(-math.inf, 2) + torch.zeros(3, device="cpu", dtype=torch.float64),), torch.randn(3))
    assert "from math import inf\n" in text and "from torch import device\n" in text


def test_branches_are_functions_inside():
    def function(p, x):
        return (torch.cond(p, lambda x: x.sin() + x[0], lambda x: x.cos() * 2, (x,)),)

    inputs = torch.tensor(True), torch.randn(3)
    module = make_fx(function, tracing_mode="symbolic")(*inputs)
    text = code(module)
    assert "    def true_graph_0(\n" in text and "    def false_graph_0(\n" in text
    for p in (True, False):
        expected = function(torch.tensor(p), inputs[1])
        torch.testing.assert_close(executed(module)(torch.tensor(p), inputs[1]), expected)


def test_symbolic_sizes():
    module = make_fx(lambda x: (x.view(-1).expand(x.shape[0], x.shape[0] * x.shape[1]),), tracing_mode="symbolic")(
        torch.randn(3, 2)
    )
    x = torch.randn(5, 4)
    torch.testing.assert_close(executed(module)(x), module(x))


def test_custom_functions_run_in_their_own_process():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    hd = fomoh_fx.transform(lambda x: Double.apply(x).sin(), wrt="inputs")
    x, v = torch.randn(3), torch.randn(2, 3)
    out = hd(x, tangents=(v,))
    assert hd.code.startswith("import fomoh_fx\nimport torch\n")
    assert torch.equal(executed(hd.stages["eliminate"])(x, v)[1], out.tangent)


def test_described():
    assert described(torch.zeros(3, 1)) == "float32[3, 1]"
    assert described((torch.zeros(3), torch.tensor(1))) == "(float32[3], int64[])"
    assert described(None) == "" and described(3) == "int"


def test_print_readable(capsys):
    hd = fomoh_fx.transform(torch.sin, wrt="inputs")
    with pytest.raises(fomoh_fx.SpecialisationError, match="call the module, or trace it"):
        hd.print_readable()
    hd.trace(torch.randn(3), tangents=(torch.randn(1, 3),))
    hd.print_readable()
    assert capsys.readouterr().out == hd.code
    hd.print_readable("normalize")
    assert "sin_tangent" not in capsys.readouterr().out
    file = io.StringIO()
    print_readable(hd.stages["expand"], file)
    assert "sin_tangent" in file.getvalue()
    with pytest.raises(fomoh_fx.ArgumentError, match="stage: expected one of capture, normalize"):
        hd.print_readable("cseee")


@pytest.mark.parametrize("stage", ["capture", "normalize", "expand", "simplify", "cse", "eliminate"])
@pytest.mark.parametrize("name", ["cond", "while_loop", "scan", "cond in scan", "map"])
def test_bodies_of_control_flow_run(name, stage):
    inputs = r(5, 3), r(3, 3)
    tangents = r(2, 5, 3), r(2, 3, 3)
    hd = fomoh_fx.transform(CASES[name][0], wrt="inputs")
    hd.trace(*inputs, tangents=tangents)
    module = hd.stages[stage]
    given = [*inputs, *tangents] if stage not in ("capture", "normalize") else [*inputs]
    missing = len(module.graph.find_nodes(op="placeholder")) - len(given)
    given = [torch.tensor(0)] * missing + given  # a loop's counter is a constant, lifted to an input
    with torch.no_grad():
        for printed, value in zip(executed(module)(*given), module(*given), strict=True):
            torch.testing.assert_close(printed, value, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cond", "while_loop", "scan", "cond in scan", "map"])
def test_every_statement_of_a_body_says_where_it_comes_from(name):
    hd = fomoh_fx.transform(CASES[name][0], wrt="inputs")
    hd.trace(r(5, 3), r(3, 3), tangents=(r(2, 5, 3), r(2, 3, 3)))
    statements = [line for line in hd.code.splitlines() if line.startswith("        ") and " = " in line.split("#")[0]]
    pattern = r"  # (primal|(tangent|cross) of \w+) \| .+ \| test_control_flow\.py:\d+, .+$"
    assert statements and all(re.search(pattern, statement) for statement in statements)
