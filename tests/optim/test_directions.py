"""Samplers and the source of directions."""

import math
from functools import partial

import pytest
import torch

from fomoh_fx.errors import ArgumentError
from fomoh_fx.low_rank import LowRank, dense
from fomoh_fx.optim.directions import Batch, RandomDirections
from fomoh_fx.optim.samplers import SAMPLERS, low_rank, norms
from fomoh_fx.optim.streams import Streams
from tests.optim.problems import flat

PARAMETERS = {"a": torch.zeros(3, 4), "b": torch.zeros(4), "c": torch.zeros(()), "d": torch.zeros(2, 2, 1)}
SIZE = 21
NOTHING = Batch((), {}, None)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_shapes_dtypes_and_scale(sampler):
    parameters = {**PARAMETERS, "half": torch.zeros(5, dtype=torch.bfloat16)}
    drawn = RandomDirections(7, sampler, seed=0).propose(parameters, NOTHING)
    for name, p in parameters.items():
        assert drawn[name].shape == (7, *p.shape)
        assert drawn[name].dtype == p.dtype
        assert dense(drawn[name]).is_contiguous()
    assert norms({name: dense(v) for name, v in drawn.items()}).mean().item() == pytest.approx(
        math.sqrt(SIZE + 5), rel=0.15
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_covariance_is_the_identity(sampler):
    source = RandomDirections(10, sampler, seed=0)
    v = torch.cat([flat(source.propose(PARAMETERS, NOTHING)) for _ in range(600)])
    assert (v.T @ v / len(v) - torch.eye(SIZE)).abs().max() < 0.12


def test_what_the_samplers_promise():
    drawn = {name: flat(RandomDirections(8, name, seed=0).propose(PARAMETERS, NOTHING)) for name in SAMPLERS}
    assert set(drawn["rademacher"].unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(drawn["sphere"].norm(dim=1), torch.full((8,), math.sqrt(SIZE)))
    for name in ("orthogonal", "coordinate"):
        torch.testing.assert_close(drawn[name] @ drawn[name].T, SIZE * torch.eye(8), rtol=0, atol=1e-4)
    assert ((drawn["coordinate"] != 0).sum(1) == 1).all()
    matrices = RandomDirections(8, "low_rank", seed=0).propose(PARAMETERS, NOTHING)
    assert isinstance(matrices["a"], LowRank)
    assert (torch.linalg.matrix_rank(matrices["a"].dense()) == 1).all()
    wider = RandomDirections(8, partial(low_rank, rank=2), seed=0).propose(PARAMETERS, NOTHING)
    assert (torch.linalg.matrix_rank(wider["a"].dense()) == 2).all()
    with pytest.raises(ArgumentError, match="^rank: "):
        low_rank(PARAMETERS, 1, Streams(0), rank=0)


@pytest.mark.parametrize("sampler", ["sphere", "orthogonal"])
def test_every_direction_is_as_likely_as_its_opposite(sampler):
    """The first axes too, whose signs a QR decomposition would fix."""
    source = RandomDirections(4, sampler, seed=0)
    v = torch.stack([flat(source.propose({"a": torch.zeros(4)}, NOTHING)) for _ in range(2000)])
    assert v.mean(0).abs().max() < 4.5 * 2000**-0.5
    single = {
        flat(RandomDirections(1, sampler, i).propose({"a": torch.zeros(1)}, NOTHING)).sign().item() for i in range(20)
    }
    assert single == {-1.0, 1.0}


def test_all_signs_are_as_likely_and_independent():
    """Every bit of the words that they are made of, and neighbours in a word and in the next."""
    v = RandomDirections(1, "rademacher", seed=0).propose({"a": torch.zeros(32, 20_000)}, NOTHING)["a"].reshape(-1, 32)
    deviation = len(v) ** -0.5
    assert v.mean(0).abs().max() < 4.5 * deviation
    off_diagonal = (v.T @ v / len(v)).fill_diagonal_(0)
    assert off_diagonal.abs().max() < 5 * deviation
    assert (v[:-1].T @ v[1:] / (len(v) - 1)).abs().max() < 5 * deviation


def test_all_coordinates_are_the_scaled_identity():
    v = flat(RandomDirections(None, "coordinate").propose(PARAMETERS, NOTHING))
    torch.testing.assert_close(v, math.sqrt(SIZE) * torch.eye(SIZE))


@pytest.mark.parametrize("sampler", ["orthogonal", "coordinate"])
def test_more_independent_directions_than_parameters_are_refused(sampler):
    with pytest.raises(ArgumentError, match="^directions: 22 "):
        RandomDirections(22, sampler, seed=0).propose(PARAMETERS, NOTHING)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_complex_parameters(sampler):
    parameters = {"z": torch.zeros(3, dtype=torch.complex128), "x": torch.zeros(2, dtype=torch.float64)}
    v = RandomDirections(8, sampler, seed=0).propose(parameters, NOTHING)
    assert v["z"].dtype == torch.complex128
    rows = torch.cat([torch.view_as_real(v["z"]).reshape(8, -1), v["x"]], 1)
    assert rows.norm(dim=1).mean().item() == pytest.approx(math.sqrt(8), rel=0.2)


def test_a_seed_decides_and_torchs_own_seed_decides_without_one():
    def drawn(seed):
        return flat(RandomDirections(2, "normal", seed).propose(PARAMETERS, NOTHING))

    assert torch.equal(drawn(5), drawn(5))
    assert not torch.equal(drawn(5), drawn(6))
    torch.manual_seed(0)
    first = drawn(None)
    second = drawn(None)
    torch.manual_seed(0)
    assert torch.equal(drawn(None), first)
    assert not torch.equal(first, second)


def test_drawing_leaves_torchs_own_generator_alone():
    source = RandomDirections(2, "normal", seed=0)
    before = torch.get_rng_state()
    source.propose(PARAMETERS, NOTHING)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_previous_step_is_the_last_direction_normalised():
    source = RandomDirections(3, "normal", 0, previous_step=True)
    first = source.propose(PARAMETERS, NOTHING)
    change = {name: torch.full_like(p, 1e-3) for name, p in PARAMETERS.items()}
    source.observe(first, change)
    second = source.propose(PARAMETERS, NOTHING)
    torch.testing.assert_close(flat(second)[-1], torch.ones(SIZE))
    source.observe(second, {name: torch.zeros_like(p) for name, p in PARAMETERS.items()})
    assert torch.equal(flat(source.propose(PARAMETERS, NOTHING))[-1], flat(second)[-1])


def test_a_function_is_a_sampler():
    source = RandomDirections(
        2, lambda parameters, count, _: {n: p.expand(count, *p.shape) for n, p in parameters.items()}
    )
    assert flat(source.propose(PARAMETERS, NOTHING)).shape == (2, SIZE)


def test_the_step_before_is_not_the_only_direction():
    with pytest.raises(ArgumentError, match="^directions: .* previous_step=True .* 2 or more"):
        RandomDirections(1, "normal", previous_step=True)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_the_number_of_directions_is_checked(count):
    with pytest.raises(ArgumentError, match="^directions: "):
        RandomDirections(count, "normal")


def test_the_sampler_is_checked():
    with pytest.raises(ArgumentError, match="^sampler: .*rademacher.*activity"):
        RandomDirections(1, "gauss")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_parameters_of_different_dtypes(sampler):
    for first, second in ((torch.float32, torch.float64), (torch.float64, torch.bfloat16)):
        parameters = {"a": torch.zeros(9, 7, dtype=first), "b": torch.zeros(8, dtype=second)}
        v = RandomDirections(3, sampler, seed=0).propose(parameters, NOTHING)
        assert (v["a"].dtype, v["b"].dtype) == (first, second)
