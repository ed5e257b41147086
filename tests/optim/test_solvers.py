"""Plane solvers on regular, singular and indefinite planes."""

from functools import partial

import pytest
import torch

import fomoh_fx
from fomoh_fx.errors import ArgumentError
from fomoh_fx.optim import FoMoHKD, TrustRegion
from fomoh_fx.optim.solvers import jitter, saddle_free, solver_of
from tests.optim.problems import Quadratic

EXACT = {"jitter": jitter, "saddle_free": saddle_free}


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def plane(*eigenvalues: float) -> torch.Tensor:
    basis = torch.linalg.qr(r(len(eigenvalues), len(eigenvalues))).Q
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


@pytest.mark.parametrize("solver", EXACT.values(), ids=EXACT)
def test_regular_planes_give_newtons_step(solver):
    h, g = plane(1.0, 2.0, 5.0), r(3)
    torch.testing.assert_close(solver(g, h), -torch.linalg.solve(h, g))
    torch.testing.assert_close(solver(g[:1], h[:1, :1]), -g[:1] / h[0, 0])


def test_jitter_is_exactly_newton_on_a_regular_indefinite_plane():
    h, g = plane(-1.0, 2.0, 5.0), r(3)
    torch.testing.assert_close(jitter(g, h), -torch.linalg.solve(h, g))


def test_jitter_does_not_depend_on_the_directions_lengths():
    h, g, lengths = plane(1.0, 2.0, 5.0), r(3), torch.tensor([1.0, 1e-6, 1e6], dtype=torch.float64)
    torch.testing.assert_close(jitter(g * lengths, h * lengths.outer(lengths)) * lengths, jitter(g, h))


@pytest.mark.parametrize("solver", EXACT.values(), ids=EXACT)
def test_a_direction_given_twice_gives_the_same_step(solver):
    twice = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 0]], dtype=torch.float64)
    h, g = plane(1.0, 3.0), r(2)
    kappa = solver(twice[:, :2] @ g, twice[:, :2] @ h @ twice[:, :2].T)
    torch.testing.assert_close(twice[:, :2].T @ kappa, -torch.linalg.solve(h, g), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", EXACT.values(), ids=EXACT)
def test_a_dead_direction_is_not_taken(solver):
    h, g = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64)), torch.tensor([1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(solver(g, h), torch.tensor([-0.5, 0.0], dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("solver", EXACT.values(), ids=EXACT)
def test_no_curvature_at_all_is_a_gradient_step(solver):
    torch.testing.assert_close(solver(r(3), torch.zeros(3, 3, dtype=torch.float64)), -r(3))


@pytest.mark.parametrize("solver", EXACT.values(), ids=EXACT)
def test_nearly_singular_planes_stay_finite(solver):
    for small in (0.0, 1e-300, 1e-20, 1e-16, 1e-12):
        assert solver(r(3), plane(1.0, 1.0, small)).isfinite().all()


def test_saddle_free_goes_downhill_where_newton_goes_up():
    h, g = plane(-1.0, -2.0, 5.0), r(3)
    assert g @ saddle_free(g, h) < 0
    values, vectors = torch.linalg.eigh(h)
    torch.testing.assert_close(saddle_free(g, h), -vectors @ ((vectors.T @ g) / values.abs()))


def test_a_function_is_a_solver_and_other_names_are_refused():
    own = partial(saddle_free, floor=0.1)
    assert solver_of(own) is own
    with pytest.raises(ArgumentError, match="^solver: .*saddle_free"):
        solver_of("newton")
    with pytest.raises(ArgumentError, match=r"^solver: .*TrustRegion\(\.\.\)"):
        solver_of(TrustRegion)


RESULTS = {
    "longer": lambda g, h: torch.zeros(len(g) + 1),
    "a column": lambda g, h: -g[:, None],
    "a number": lambda g, h: -g.sum(),
    "nothing": lambda g, h: None,
}


@pytest.mark.parametrize("result", RESULTS)
def test_what_a_solver_returns_is_checked(result):
    opt = FoMoHKD(fomoh_fx.transform(Quadratic()), solver=RESULTS[result])
    with pytest.raises(ArgumentError, match=r"^solver: .*\(3,\)"):
        opt.step()
