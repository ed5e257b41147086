"""The parts of a step as programs: traced once, for the settings of now, with what objects remember."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fomoh_fx
from fomoh_fx import lower
from fomoh_fx.optim import FGD, FoMoH, FoMoHBP, FoMoHKD, LevenbergMarquardt, Newton, TrustRegion
from fomoh_fx.optim.program import Program, is_own
from fomoh_fx.optim.solvers import SOLVERS, jitter
from fomoh_fx.optim.step_length import StepLength

torch.manual_seed(0)
X, Y = torch.randn(16, 4), torch.randint(0, 3, (16,))


class Counting:
    """Remembers a sum and a dictionary of tensors."""

    remembers = ("total", "seen")
    settings = ("factor",)

    def __init__(self):
        self.factor, self.total, self.seen = 2.0, torch.zeros(()), {"x": torch.zeros(3)}

    def add(self, x):
        self.total = self.total + self.factor * x.sum()
        self.seen["x"] = x * 1
        return self.total, x, None


def graph_by_graph(graphs):
    def lowering(module, dynamic):
        graphs.append(module)
        return module

    return lowering


def test_what_is_remembered_is_an_input_and_an_output():
    counting, graphs = Counting(), []
    program = Program(counting.add, graph_by_graph(graphs))
    for count in (1, 2, 3):
        x = torch.full((3,), float(count))
        total, same, nothing = program([counting], x)
        assert total is counting.total and same is x and nothing is None
        assert torch.equal(counting.seen["x"], x)
    assert float(counting.total) == 2.0 * 3 * (1 + 2 + 3) and len(graphs) == 1


def test_another_setting_is_another_program():
    counting, graphs = Counting(), []
    program = Program(counting.add, graph_by_graph(graphs))
    program([counting], torch.ones(3))
    counting.factor = -1.0
    program([counting], torch.ones(3))
    assert float(counting.total) == 6.0 - 3.0 and len(graphs) == 2


def test_an_error_while_tracing_leaves_what_is_remembered():
    counting = Counting()
    total = counting.total

    def failing(x):
        counting.add(x)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Program(failing, graph_by_graph([]))([counting], torch.ones(3))
    assert counting.total is total and torch.equal(counting.seen["x"], torch.zeros(3))


def test_numbers_that_nobody_said_to_remember_are_no_constants():
    forgotten = torch.ones(3)
    with pytest.raises(AssertionError, match="nobody said"):
        Program(lambda x: x + forgotten, graph_by_graph([]))([], torch.ones(3))


MADE = {
    "FGD": lambda hd: FGD(hd, seed=0),
    "FoMoH": lambda hd: FoMoH(hd, directions=2, seed=0),
    "FoMoH-BP": FoMoHBP,
    "FoMoH-KD": lambda hd: FoMoHKD(hd, lr=0.5, seed=0, previous_step=True, weight_decay=0.1, diagnostics=True),
    "trust region": lambda hd: FoMoHKD(hd, solver="trust_region", seed=0),
    "Levenberg-Marquardt": lambda hd: FoMoHKD(hd, solver="levenberg_marquardt", sampler="rademacher", seed=0),
    "low rank": lambda hd: FoMoHKD(hd, lr=0.5, sampler="low_rank", seed=0),
    "activity": lambda hd: FoMoHKD(hd, sampler="activity", seed=0),
    "Newton": lambda hd: Newton(hd, solver="saddle_free"),
}


def trained(make, lowering, steps=5):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    hd = fomoh_fx.transform(model, cross_entropy)
    hd.lowering = lowering
    optimizer = make(hd)
    return optimizer, [float(optimizer.step(X.double(), targets=(Y,))) for _ in range(steps)]


@pytest.mark.parametrize("name", MADE)
def test_programs_do_what_their_functions_do(name):
    graphs = []
    optimizer, losses = trained(MADE[name], graph_by_graph(graphs))
    once = len(graphs)
    expected, reference = trained(MADE[name], lower.eager)
    torch.testing.assert_close(losses, reference, rtol=1e-9, atol=0)
    assert [optimizer.skipped, optimizer.refused] == [expected.skipped, expected.refused]
    optimizer.step(X.double(), targets=(Y,))
    assert len(graphs) == once  # nothing is traced anew at a later step
    if optimizer.diagnostics:
        expected.step(X.double(), targets=(Y,))
        torch.testing.assert_close(optimizer.last_step.predicted, expected.last_step.predicted)
        torch.testing.assert_close(optimizer.last_step.actual, expected.last_step.actual, rtol=1e-6, atol=1e-12)


def test_a_solver_of_ones_own_runs_as_it_is_written():
    """It may count, which a program would not see."""
    taken = []

    def solver(g, h):
        taken.append(float(g.norm()))
        return -g / len(taken)

    optimizer, _ = trained(lambda hd: FoMoHKD(hd, solver=solver, seed=0), graph_by_graph([]))
    assert len(taken) == 5 and not is_own(solver) and is_own(jitter, optimizer)


def test_an_optimizer_of_ones_own_runs_as_it_is_written():
    class Growing(FGD):
        count = 0

        def coefficients(self, value):
            self.count += 1
            return super().coefficients(value) * self.count

    optimizer, _ = trained(lambda hd: Growing(hd, seed=0), graph_by_graph([]))
    assert optimizer.count == 5


def test_another_solver_is_asked():
    optimizer, _ = trained(MADE["FoMoH-KD"], graph_by_graph([]))
    optimizer.solver = lambda g, h: torch.zeros_like(g)
    optimizer.step(X.double(), targets=(Y,))
    assert not optimizer.last_step.part.any()


def test_a_setting_is_seen_where_a_solver_of_ones_own_runs():
    optimizer, _ = trained(
        lambda hd: FoMoHKD(hd, solver=lambda g, h: -g, lr=0.01, largest_rise=None), graph_by_graph([]), 1
    )
    optimizer.largest_rise = 0.1
    optimizer.step(X.double(), targets=(Y,))
    assert optimizer.refused == 0


def plain(value):
    return isinstance(value, (bool, int, float, str, tuple))


@pytest.mark.parametrize("name", MADE)
def test_every_number_that_decides_is_a_setting(name):
    """A program would not see that another one is assigned."""
    optimizer, _ = trained(MADE[name], lower.eager, 1)
    solvers = [kind() for kind in SOLVERS.values() if isinstance(kind, type)]
    for part in [optimizer, optimizer.directions, *solvers, StepLength(), LevenbergMarquardt(), TrustRegion()]:
        own = {key for key, value in vars(part).items() if plain(value) and not key.startswith("_")}
        assert own - {"seed", "count", "curvature", "perturbations"} <= {*part.settings}, part
        assert {*part.remembers} <= {*vars(part)}, part
