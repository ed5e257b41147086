"""Every node says where it comes from: the user's own innermost line, where there is one."""

import inspect
import linecache
from pathlib import Path

import pytest
import torch
from torch import nn

import fomoh_fx
from fomoh_fx.passes import provenance
from fomoh_fx.passes.provenance import source_line
from tests.passes.waste import MLP, MODELS, compiled

HERE = Path(__file__).name


def sources(hd, stage="eliminate"):
    """The source of each named primal node."""
    return {n.name: provenance.of(n).source for n in hd.stages[stage].graph.nodes if n.op == "call_function"}


def traced(model, *args, loss=None, targets=None):
    hd = fomoh_fx.transform(model, loss, wrt="inputs")
    hd.trace(*args, tangents=tuple(torch.randn(2, *a.shape) for a in args), targets=targets)
    return hd


@pytest.mark.parametrize("stage", ["capture", "normalize", "expand", "simplify", "cse", "eliminate"])
def test_a_model_in_a_file(stage):
    found = sources(compiled("mlp")[0], stage)
    start = inspect.getsourcelines(MLP)[1]
    assert found["linear"].endswith("return torch.tanh(self.inner(x))")  # the method's line, not forward's
    assert found["linear"] == found["tanh"]
    assert found["relu"].startswith(f"waste.py:{start + 13}, ") or "self.rest(torch.relu(x) * 2)" in found["relu"]
    assert found["linear_1"].endswith("return self.rest(torch.relu(x) * 2)")  # nn.Sequential inside
    assert all(source.startswith("waste.py:") for source in found.values())


def test_components_have_the_line_of_their_primal():
    found = sources(compiled("mlp")[0])
    assert found["tanh_tangent"] == found["tanh_cross"] == found["tanh"]


@pytest.mark.parametrize("name", MODELS)
def test_every_call_of_every_stage_has_a_source_and_a_primal(name):
    hd, specialization = compiled(name)
    primals = {n.name for n in specialization.stages["normalize"].graph.nodes}
    for stage, module in specialization.stages.items():
        for node in module.graph.nodes:
            origin = provenance.of(node)
            assert origin.component in provenance.COMPONENTS
            if node.op == "call_function":
                assert origin.source, f"{stage}: {node.name}"
            if node.op != "output" and stage not in ("capture", "normalize"):
                assert origin.primal in primals, f"{stage}: {node.name}"


def test_inputs_are_labelled():
    module = compiled("mlp")[1].compiled.final
    found = {n.name: str(provenance.of(n)) for n in module.graph.find_nodes(op="placeholder")}
    assert found["inner_weight"] == "primal"
    assert found["inner_weight_tangent"] == "tangent of inner_weight"


def test_modules_without_a_line_of_the_user_give_their_path():
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh()))
    found = sources(traced(model, torch.randn(2, 3), loss=nn.MSELoss(), targets=(torch.randn(2, 3),)))
    assert found["linear"] == "0 (Linear)"
    assert found["tanh"] == "1.0 (Tanh)"
    assert found["mean"] == "loss (MSELoss)"


def test_an_encoder_layer_of_pytorch_gives_paths():
    found = set(sources(compiled("encoder")[0]).values())
    assert {"self_attn (MultiheadAttention)", "linear1 (Linear)", "TransformerEncoderLayer"} <= found
    assert not any(".py" in source for source in found)


def test_functions_and_lambdas():
    def function(x):
        return torch.sin(x) * 2

    found = sources(traced(function, torch.randn(3)))
    assert found["sin"].startswith(HERE) and found["sin"].endswith("return torch.sin(x) * 2")
    found = sources(traced(lambda x: torch.cos(x), torch.randn(3)))
    assert "lambda x: torch.cos(x)" in found["cos"]


def test_a_loss_function():
    def loss(output, target):
        difference = output - target
        return difference.square().mean()

    found = sources(traced(nn.Linear(3, 2), torch.randn(4, 3), loss=loss, targets=(torch.randn(4, 2),)))
    assert found["sub"].endswith("difference = output - target")


def test_the_second_frontend():
    def function(x):
        y = torch.tanh(x)
        return torch.vmap(torch.func.grad(lambda v: v.sin()))(y)

    hd = traced(function, torch.randn(3))
    assert hd.report().frontend == "make_fx"
    assert sources(hd)["tanh"].endswith("y = torch.tanh(x)")


def test_a_notebook_cell():
    text = "import torch\ndef cell(x):\n    return torch.sin(x)\n"
    name = "/tmp/ipykernel_1/123.py"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace = {}
    exec(compile(text, name, "exec"), namespace)
    assert sources(traced(namespace["cell"], torch.randn(3)))["sin"] == "notebook:3, return torch.sin(x)"


def frame(file, line, code):
    return f'  File "{file}", line {line}, in forward\n' + (f"    {code}\n" if code else "")


def test_hidden_frames():
    site = str(Path(torch.__file__).parent.parent)
    trace = frame("/home/me/model.py", 3, "y = layer(x)")
    for hidden in (
        f"{site}/torch/nn/modules/linear.py",
        fomoh_fx.__file__,
        provenance.__file__,
        "<eval_with_key>.3",
        linecache.__file__,
    ):
        assert source_line(trace + frame(hidden, 9, "hidden")) == "model.py:3, y = layer(x)"
    assert source_line(trace + frame(f"{site}/torchvision/models/resnet.py", 9, "shown")) == "resnet.py:9, shown"


def test_frames_outside_the_model_are_not_the_models():
    root = str(Path(fomoh_fx.__file__).parent / "capture" / "root.py")
    outside = frame("/home/me/train.py", 3, "hd(x)") + frame(root, 9, "self.model(*args)")
    assert source_line(outside) == ""
    assert source_line(outside + frame("/home/me/model.py", 5, "x * 2")) == "model.py:5, x * 2"


def test_a_frame_without_code():
    assert source_line(frame("a.py", 1, "") + frame("b.py", 2, "x")) == "b.py:2, x"
    assert source_line(frame("a.py", 1, "x") + frame("b.py", 2, "")) == "b.py:2"
    assert source_line(None) == ""
