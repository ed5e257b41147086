"""Specialisations are kept by use, and no more than so many."""

import copy
import warnings

import pytest
import torch
from torch import Tensor

import fomoh_fx
from fomoh_fx.cache import Cache

X = torch.linspace(0.1, 1, 4, dtype=torch.float64)


def powers(x: Tensor, times: Tensor) -> Tensor:
    """The value of an argument decides how often."""
    for _ in range(int(times)):
        x = x * x
    return x.sum()


def check(hd, times: int) -> None:
    out = hd(X, torch.tensor(times), tangents=(X[None], None))
    torch.testing.assert_close(out.primal, powers(X, torch.tensor(times)))
    torch.testing.assert_close(out.tangent, 2**times * (X ** (2**times)).sum()[None])


def test_the_least_recently_used_one_is_dropped_with_one_warning() -> None:
    hd = fomoh_fx.transform(powers, wrt="inputs")
    hd.most_specializations = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for times in (1, 2, 1):
            check(hd, times)
    with pytest.warns(UserWarning, match="more than 2 specialisations") as caught:
        check(hd, 3)
    assert len(hd._traced) == 2 and caught[0].filename == __file__
    kept = list(hd._traced)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(hd, 1)
        assert hd.latest is kept[0]
        check(hd, 2)  # captured again
    assert hd._traced == [kept[0], hd.latest]


def test_fewer_than_none_are_none() -> None:
    hd = fomoh_fx.transform(powers, wrt="inputs")
    hd.most_specializations = -1
    with pytest.warns(UserWarning, match="more than 0 specialisations") as caught:
        check(hd, 1)
    assert hd._traced == [] and caught[0].filename == __file__
    check(hd, 2)


def test_a_dropped_one_has_no_signature_left() -> None:
    cache: Cache[list[int]] = Cache()
    a, b, c = [1], [1], [2]
    for signature, value in (("a", a), ("also a", a), ("b", b)):
        cache.add(signature, value)
    with pytest.warns(UserWarning, match="more than 2"):
        cache.add("a", c, 2)
    assert [id(v) for v in cache.values] == [id(b), id(c)] and cache._by_signature == {"b": [b], "a": [c]}


def test_sizes_that_are_dynamic_are_one_specialisation() -> None:
    hd = fomoh_fx.transform(lambda x: x.sin().sum(), wrt="inputs")
    hd.most_specializations = 1
    hd.trace(X, tangents=(X[None],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in range(2, 5):
            hd(X[:n], tangents=(X[None, :n],))
    assert len(hd._traced) == 1


def test_a_copy_has_none() -> None:
    hd = fomoh_fx.transform(torch.nn.Linear(4, 1).double())
    tangents = {"bias": X[None, :1]}
    hd(X, tangents=tangents)
    copied = copy.deepcopy(hd)
    assert not copied._traced and len(hd._traced) == 1
    torch.testing.assert_close(copied(X, tangents=tangents).tangent, hd(X, tangents=tangents).tangent)
