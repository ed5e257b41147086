"""Pictures of a graph."""

import builtins

import networkx
import pytest
import torch

import fomoh_fx
from fomoh_fx.inspect import draw
from fomoh_fx.inspect.drawing import COLOURS, layered
from tests.passes.waste import compiled


@pytest.fixture(scope="module")
def hd():
    return compiled("mlp")[0]


def test_layers_follow_the_dataflow(hd):
    flow = layered(hd.stages["eliminate"])
    layer = networkx.get_node_attributes(flow, "layer")
    assert all(layer[a] < layer[b] for a, b in flow.edges)
    assert flow.nodes["tanh_cross"]["component"] == "cross"
    assert flow.nodes["tanh_cross"]["primal"] == "tanh"


def test_dot(hd, tmp_path):
    text = draw(hd.stages["eliminate"], tmp_path / "graph.dot").read_text()
    assert text.startswith("digraph {") and text.endswith("}\n")
    (line,) = [line for line in text.splitlines() if line.startswith('  "tanh_tangent" [')]
    assert COLOURS["tangent"] in line and "aten.mul.Tensor" in line and "self.inner(x)" in line
    assert '  "linear" -> "tanh"' in text
    assert text.count('"') % 2 == 0


def test_graphml(hd, tmp_path):
    flow = networkx.read_graphml(draw(hd.stages["eliminate"], tmp_path / "graph.graphml"))
    assert len(flow) == len(hd.stages["eliminate"].graph.nodes)
    assert flow.nodes["tanh"]["operator"] == "aten.tanh.default"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture(hd, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    hd.draw(tmp_path / f"graph.{suffix}")
    assert (tmp_path / f"graph.{suffix}").stat().st_size > 10_000
    hd.draw(str(tmp_path / f"primal.{suffix}"), stage="normalize")
    assert (tmp_path / f"primal.{suffix}").exists()


def test_without_matplotlib(hd, tmp_path, monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'fomoh-fx\[examples\]'"):
        hd.draw(tmp_path / "graph.png")
    hd.draw(tmp_path / "graph.dot")


def test_other_endings(hd, tmp_path):
    with pytest.raises(fomoh_fx.ArgumentError, match="path: must end in one of .png"):
        hd.draw(tmp_path / "graph.txt")


def test_nothing_to_draw_yet(tmp_path):
    with pytest.raises(fomoh_fx.SpecialisationError):
        fomoh_fx.transform(torch.sin, wrt="inputs").draw(tmp_path / "graph.dot")
