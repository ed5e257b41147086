"""The update as a program."""

import math

import pytest
import torch

from fomoh_fx import lower
from fomoh_fx.optim.program import Program
from fomoh_fx.optim.update import update


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    parameters = [torch.randn(4, 3, dtype=dtype), torch.randn(4, dtype=dtype), torch.randn((), dtype=dtype)]
    directions = [torch.randn(2, *p.shape, dtype=dtype) for p in parameters]
    rates = [torch.tensor(rate, dtype=torch.float64) for rate in (0.1, 0.1, 1.0)]
    return parameters, directions, torch.randn(2, dtype=torch.float64), rates, {1: rates[1] * 0.5}, [torch.ones(2)]


def recording(graphs):
    def lowering(module, dynamic):
        graphs.append(module)
        return module

    return lowering


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lowered", [False, True])
def test_parameters_move_by_the_formula(dtype, lowered):
    parameters, directions, kappa, rates, decays, needed = problem(dtype)
    before = [p.double().clone() for p in parameters]
    program = Program(update, recording([]) if lowered else lower.eager)
    valid, *moved = program([], parameters, directions, kappa, rates, decays, needed)
    assert valid
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
    for i, (p, old, v, rate, change) in enumerate(zip(parameters, before, directions, rates, moved, strict=True)):
        step = rate * sum(kappa[k] * v[k].double() for k in range(2))
        kept = old * (1 - 0.05 if i == 1 else 1)
        torch.testing.assert_close(p.double(), kept + step, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(change.double(), step, rtol=tolerance, atol=tolerance)
        assert p.dtype == change.dtype == dtype


@pytest.mark.parametrize("what", ["needed", "direction", "kappa"])
@pytest.mark.parametrize("lowered", [False, True])
def test_nothing_moves_where_something_is_not_finite(what, lowered):
    parameters, directions, kappa, rates, decays, needed = problem()
    before = [p.clone() for p in parameters]
    {"needed": needed[0], "direction": directions[2], "kappa": kappa}[what][0] = math.nan
    valid, *moved = Program(update, recording([]) if lowered else lower.eager)(
        [], parameters, directions, kappa, rates, decays, needed
    )
    assert not valid
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert not any(change.any() for change in moved)


def test_another_rate_is_the_same_program():
    graphs = []
    program = Program(update, recording(graphs))
    for rate in (0.1, 0.2):
        parameters, directions, kappa, rates, decays, needed = problem()
        before = [p.clone() for p in parameters]
        rates = [torch.tensor(rate, dtype=torch.float64)] * 3
        _, *moved = program([], parameters, directions, kappa, rates, {}, needed)
        for p, old, v, change in zip(parameters, before, directions, moved, strict=True):
            torch.testing.assert_close(change, rate * torch.tensordot(kappa, v, 1))
            torch.testing.assert_close(p, old + change)
    assert len(graphs) == 1
    products = {torch.ops.aten.mm.default, torch.ops.aten.mv.default}
    assert not products & {node.target for node in graphs[0].graph.nodes}  # sums fuse with what follows
