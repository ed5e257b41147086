"""A sample of the operators in other precisions; ``python -m tests.coverage --dtype bfloat16`` judges them all."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from tests.coverage.precision import NEAR, judge_precision
from tests.coverage.samples import operators
from tests.coverage.sweep import judge, judge_all
from tests.coverage.table import read

ROWS = read()
MOST = 3


def _some(dtype: torch.dtype, count: int) -> list[str]:
    known = operators()
    exact = sorted(name for name, row in ROWS.items() if row.outcome == "exact")
    return random.Random(0).sample([name for name in exact if dtype in known[name].supported_dtypes("cpu")], count)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128, torch.complex64], ids=str)
def test_dtype(dtype: torch.dtype) -> None:
    """In lower precision near double precision and of the same dtype; complex numbers by the oracle."""
    judge_one = judge_precision if dtype in NEAR else judge
    found = list(judge_all(_some(dtype, 15), partial(judge_one, dtype=dtype), MOST, jobs=1))
    assert not [str(verdict) for verdict in found if verdict.outcome in ("wrong", "crash")]
