"""The figures of a specialisation."""

import pytest
import torch
from torch import nn
from torch._higher_order_ops.while_loop import while_loop
from torch.fx.experimental.proxy_tensor import make_fx

import fomoh_fx
from fomoh_fx.inspect.statistics import peak_bytes
from tests.passes.waste import compiled


def test_nothing_to_report_yet():
    with pytest.raises(fomoh_fx.SpecialisationError):
        fomoh_fx.transform(nn.Linear(2, 2)).report()


def test_report():
    hd, specialization = compiled("mlp", directions=3)
    report = hd.report()
    assert (report.frontend, report.refused) == ("torch.export", ())
    assert (report.directions, report.second_order, report.crosses) == (3, "plane", 6)
    assert list(report.nodes) == list(specialization.stages)
    assert report.nodes["normalize"] == {"primal": 7}
    assert set(report.nodes["eliminate"]) == {"primal", "tangent", "cross"}
    counts = [sum(n.values()) for n in report.nodes.values()]
    assert counts[2:] == sorted(counts[2:], reverse=True)
    assert report.simplified + report.merged + report.fused + report.dead == counts[2] - counts[-1]
    assert report.fused > 0
    assert report.inactive == 0
    assert report.zero_crosses == 1  # the first layer
    assert report.served["aten.linear.default"] == ("bilinear", 3)
    assert report.products["primal"] == 3
    assert report.products["cross"] > 0


def test_inactive_operations():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    hd = fomoh_fx.transform(model, second_order=None, wrt="2.*")
    hd.trace(torch.randn(4, 3), tangents={"2.bias": torch.randn(2, 2)})
    report = hd.report()
    assert report.inactive == 2
    assert report.products == {"primal": 2}
    assert (report.second_order, report.crosses, report.zero_crosses) == (None, 0, 0)
    assert "second order           none" in str(report)


def test_table():
    lines = str(compiled("mlp")[0].report()).splitlines()
    assert lines[0] == "captured by            torch.export"
    table = lines[lines.index(next(line for line in lines if line.startswith("nodes"))) :]
    assert table[0].split() == ["nodes", "primal", "tangent", "cross", "all"]
    assert table[2].split() == ["normalize", "7", "0", "0", "7"]
    assert len({len(line) for line in table[:8]}) == 1  # aligned
    assert any(line.split() == ["aten.relu.default", "gated", "1"] for line in lines)


def peak(function, *inputs):
    return peak_bytes(make_fx(function, tracing_mode="fake")(*inputs).graph)


def test_peak_memory():
    x = torch.randn(100)  # 400 bytes
    assert peak(lambda x: (x.sin(),), x) == 400
    assert peak(lambda x: (x.sin().cos().exp(),), x) == 800  # an argument is released after its use
    assert peak(lambda x: (x.sin() + x.cos(), x.exp()), x) == 1200
    assert peak(lambda x: (x.sin().view(10, 10).t(),), x) == 400  # views take nothing
    assert peak(lambda x: (x.view(10, 10),), x) == 0  # neither do inputs
    assert peak(lambda x: (torch.cat([x.sin().view(10, 10)] * 2).exp(),), x) == 1600
    assert peak(lambda x: (x.sort()[0],), x) == 400 + 800


def test_symbolic_sizes_have_no_peak():
    assert peak_bytes(make_fx(lambda x: (x.sin(),), tracing_mode="symbolic")(torch.randn(3)).graph) is None


def test_bodies_count_once():
    def function(x, w):
        def body(i, c):
            return i + 1, torch.tanh(c @ w)

        return while_loop(lambda i, c: i < 50, body, (torch.tensor(0), x))[1].floor()

    hd = fomoh_fx.transform(function, wrt="inputs")
    hd.trace(torch.randn(5, 3), torch.randn(3, 3), tangents=(torch.randn(2, 5, 3), torch.randn(2, 3, 3)))
    assert hd.report().nodes["normalize"] == {"primal": 4 + 1 + 3}  # with lt; while_loop, getitem, floor

    def smooth(x, w):
        return torch.cond(x.sum() > 0, lambda x: torch.tanh(x @ w) * x.detach(), lambda x: x.cos() @ w, (x,))

    hd = fomoh_fx.transform(smooth, wrt="inputs")
    hd.trace(torch.randn(3, 3), torch.randn(3, 3), tangents=(torch.randn(2, 3, 3), torch.randn(2, 3, 3)))
    report = hd.report()
    assert report.served["aten.mm.default"] == ("bilinear", 2)
    assert report.served["cond"] == ("control flow", 1)
    assert report.inactive == 3  # the condition's sum and comparison, and detach
    assert report.products["primal"] == 2 and report.products["cross"] > 0
    assert report.peak_bytes > 0
