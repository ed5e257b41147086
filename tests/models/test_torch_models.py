"""Whole models built from torch alone, against reverse-over-reverse."""

import pytest
import torch

import fomoh_fx
from tests.models.checking import check
from tests.models.models import PROBLEMS


@pytest.mark.parametrize("name", PROBLEMS)
def test_eager(name):
    check(PROBLEMS[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_compiled(name):
    with torch._inductor.config.patch(fallback_random=True):
        check(PROBLEMS[name](), lower=fomoh_fx.compile)
