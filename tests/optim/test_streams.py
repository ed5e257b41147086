"""Random numbers of directions: the counter-based generator, and the streams."""

import copy

import pytest
import torch

from fomoh_fx.optim import philox
from fomoh_fx.optim.samplers import SAMPLERS
from fomoh_fx.optim.streams import MANY, Streams

#: Counter, key and words, as Random123 publishes them for philox2x32 in ten rounds (``kat_vectors``).
KNOWN = [
    ((0x00000000, 0x00000000), 0x00000000, (0xFF1DAE59, 0x6CD10DF2)),
    ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0x2C3F628B, 0xAB4FD7AD)),
    ((0x243F6A88, 0x85A308D3), 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
]
COUNT = 200_000


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_known_words(counter, key, expected, compiled):
    words = torch.compile(philox.words, fullgraph=True) if compiled else philox.words
    low, high = (torch.full((1003,), word) for word in counter)  # with a rest that fills no vector
    for word, one in zip(words(philox.schedule(torch.tensor(key)), low, high), expected, strict=True):
        assert word.unique().tolist() == [one]


def draw(dtype: torch.dtype, key: int = 1, stream: int = 2, count: int = COUNT) -> torch.Tensor:
    return philox.normals(philox.schedule(torch.tensor(key)), torch.tensor(stream), count, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_moments(dtype):
    """Each within 4.5 standard deviations of what N(0, 1) has."""
    x = draw(dtype)
    assert x.dtype == dtype
    assert x.shape == (2 * COUNT,)
    x = x.double()
    for power, moment in enumerate((0, 1, 0, 3, 0, 15), start=1):
        variance = {1: 1, 2: 2, 3: 15, 4: 96, 5: 945, 6: 10_170}[power]
        slack = 0.01 if dtype == torch.bfloat16 else 0  # rounding
        assert abs((x**power).mean() - moment) < 4.5 * (variance / len(x)) ** 0.5 + slack * moment
    tail = (x.abs() > 3).double().mean()
    assert tail.item() == pytest.approx(0.0027, rel=0.15)


def test_places_keys_and_streams_are_independent():
    base = draw(torch.float64)
    others = [draw(torch.float64, key=3), draw(torch.float64, stream=3), base.roll(1), base.roll(COUNT)]
    for other in others:
        for a, b in ((base, other), (base.square() - 1, other.square() - 1)):
            correlation = (a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()
            assert abs(correlation) < 5 / len(base) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_signs_are_the_bits_of_the_words(dtype):
    keys, stream, count = philox.schedule(torch.tensor(1)), torch.tensor(2), 50
    low, high = philox.words(keys, torch.arange(count), stream)
    words = torch.stack([low, high], 1).flatten().tolist()
    bits = [1 - 2 * (word >> 31 - place & 1) for word in words for place in range(32)]
    signs = philox.signs(keys, stream, count, dtype)
    assert signs.dtype == dtype
    assert signs.tolist() == bits


def test_signs_are_independent():
    """Each bit's mean, and the products of neighbours, words and halves, within 4.5 standard deviations of zero."""
    signs = philox.signs(philox.schedule(torch.tensor(3)), torch.tensor(4), COUNT // 16, torch.float64)
    by_place = signs.view(-1, 64).mean(0)
    assert by_place.abs().max() < 4.5 * (64 / len(signs)) ** 0.5
    for shift in (1, 2, 31, 32, 64, len(signs) // 2):
        assert abs((signs * signs.roll(shift)).mean()) < 4.5 / len(signs) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["normal", "rademacher", "sphere", "low_rank"])
def test_lowered_streams_resume_and_copies_go_on(sampler):
    parameters = {"large": torch.zeros(301, 211), "small": torch.zeros(5), "double": torch.zeros(3 * MANY).double()}
    streams = Streams(0)
    streams.lowered = True
    SAMPLERS[sampler](parameters, 3, streams)
    other, twin = Streams(1), copy.deepcopy(streams)
    other.lowered = True
    other.load_state_dict(streams.state_dict())
    expected, again, copied = (SAMPLERS[sampler](parameters, 3, s) for s in (streams, other, twin))
    for name in parameters:
        for left, right in ((expected, again), (expected, copied)):
            parts = [x if isinstance(x, torch.Tensor) else x.dense() for x in (left[name], right[name])]
            torch.testing.assert_close(*parts, rtol=0, atol=0)
    later = SAMPLERS[sampler](parameters, 3, streams)["double"]
    assert not torch.equal(expected["double"], later)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "each"), [("normals", 2), ("signs", 64)])
def test_lowered_numbers_are_those_of_the_generator(kind, each):
    """The program that Inductor makes agrees with the operators one by one, also where the count is odd."""
    streams, other = Streams(0), Streams(0)
    streams.lowered = True
    like = torch.zeros((), dtype=torch.float64)
    for shape in ((MANY + 1,), (3, MANY), (7, 5, 1001)):
        drawn = getattr(streams, kind)(shape, like)
        key, stream = torch.randint(2**32, (2,), generator=other(like.device)).unbind()
        expected = getattr(philox, kind)(philox.schedule(key), stream, -(-drawn.numel() // each), torch.float64)
        torch.testing.assert_close(drawn, expected[: drawn.numel()].view(shape), rtol=0, atol=1e-12)
        assert drawn.is_contiguous()
