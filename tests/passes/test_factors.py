"""Sums with a factor of their own become sums with a product: Inductor leaves the factor out."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy

import fomoh_fx
from fomoh_fx.passes.factors import apart
from fomoh_fx.passes.verify import check_values
from tests.models.checking import Problem
from tests.oracle import relative_error, reverse_over_reverse
from tests.passes.test_simplify import operators

X, Y = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SUMS = {
    "half": (lambda x, y: torch.add(x, y, alpha=0.5), ["mul.Tensor", "add.Tensor"]),
    "another dtype": (
        lambda x, y: torch.add(x, y.float(), alpha=0.1),
        ["_to_copy.default", "_to_copy.default", "mul.Tensor", "add.Tensor"],
    ),
    "whole numbers": (lambda x, y: torch.add(x, (9 * y).long(), alpha=3), None),
    "a number": (lambda x, y: torch.add(x, 2, alpha=3), ["add.Tensor"]),
    "none": (lambda x, y: torch.add(x, y), ["add.Tensor"]),
    "complex": (lambda x, y: torch.add(x + 0j, y, alpha=1j), None),
    "difference": (lambda x, y: torch.sub(x, y, alpha=2), ["sub.Tensor"]),
}


@pytest.mark.parametrize("name", SUMS)
def test_apart(name):
    function, after = SUMS[name]
    module = apart(make_fx(lambda *xs: (function(*xs),), tracing_mode="fake")(X, Y))
    check_values(module)
    assert all("alpha" not in n.kwargs for n in module.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    assert after is None or operators(module) == after
    torch.testing.assert_close(module(X, Y)[0], function(X, Y), rtol=1e-15, atol=1e-15)


class LowRankAdapted(nn.Module):
    """As LoRA does: a product plus twice another; and factors that the model itself writes."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = (nn.Linear(*sizes, bias=False) for sizes in ((6, 5), (6, 2), (2, 5)))

    def forward(self, x):
        y = self.base(x) + 2.0 * self.up(self.down(x))
        weight = torch.add(self.base.weight, self.up.weight @ self.down.weight, alpha=0.5)
        return y + torch.add(x @ weight.T, y.tanh(), alpha=4)


@pytest.mark.slow
def test_compiled_with_factors():
    torch.manual_seed(0)
    model = LowRankAdapted().double()
    problem = Problem(model, (torch.randn(7, 6).double(),), loss=cross_entropy, targets=(torch.arange(7) % 5,))
    V = problem.directions(2)
    out = fomoh_fx.compile(fomoh_fx.transform(model, cross_entropy))(*problem.args, tangents=V, targets=problem.targets)
    names = [name for name, _ in model.named_parameters()]

    def truth(*parameters):
        values = dict(zip(names, parameters, strict=True))
        return cross_entropy(torch.func.functional_call(model, values, problem.args), *problem.targets)

    value, slopes, plane = reverse_over_reverse(truth, [*model.parameters()], [V[name] for name in names])
    assert relative_error(out.primal, value) < 1e-12
    assert relative_error(out.tangent, slopes) < 1e-12
    assert relative_error(out.hessian(), plane) < 1e-12
