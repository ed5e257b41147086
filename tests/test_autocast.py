"""Autocast: the casts are captured, also where the caller enables it, and never applied twice."""

import torch
from torch import nn

import fomoh_fx


class CastsItself(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.net(x)


def setting():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    return net, torch.randn(4, 5), {name: torch.randn(2, *p.shape) for name, p in net.named_parameters()}


def test_autocast_of_the_caller_is_part_of_the_signature():
    net, x, tangents = setting()
    hd = fomoh_fx.transform(net)
    full = hd(x, tangents=tangents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = net(x)
        out = hd(x, tangents=tangents)
    torch.testing.assert_close(out.primal, expected.detach(), rtol=0, atol=0)
    assert out.tangent.dtype == out.cross.dtype == torch.bfloat16
    torch.testing.assert_close(out.tangent.float(), full.tangent, rtol=0.05, atol=0.05)
    torch.testing.assert_close(hd(x, tangents=tangents).cross, full.cross)


def test_autocast_inside_the_model():
    net, x, tangents = setting()
    model = CastsItself(net)
    out = fomoh_fx.transform(model)(x, tangents={f"net.{name}": v for name, v in tangents.items()})
    torch.testing.assert_close(out.primal, model(x).detach(), rtol=0, atol=0)
    assert out.tangent.dtype == out.cross.dtype == torch.bfloat16


def test_an_expansion_that_is_traced_without_autocast_runs_without_it():
    net, x, tangents = setting()

    def loss(z):
        with torch.autocast("cpu", enabled=False):
            return (z.float() @ z.float().T).sum()

    hd = fomoh_fx.transform(net, loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = hd(x, tangents=tangents)
        expected = loss(net(x))
    assert out.primal.dtype == out.cross.dtype == torch.float32
    torch.testing.assert_close(out.primal, expected.detach(), rtol=0, atol=0)
