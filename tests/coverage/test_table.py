"""The committed table says nothing wrong, and a sample of its rows is judged again."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from datetime import date

import pytest

from tests.coverage.samples import operators
from tests.coverage.sweep import judge, judge_all
from tests.coverage.table import Verdict, read

ROWS = read()
MOST = 5  # samples of each operator
SHARDS = 4


def test_every_operator_is_exact_or_refused_by_name() -> None:
    assert set(ROWS) == set(operators())
    counts = Counter(row.outcome for row in ROWS.values())
    assert set(counts) <= {"exact", "refused", "no oracle", "not floating"}
    assert counts["exact"] >= 495
    assert all(row.reason for row in ROWS.values() if row.outcome == "refused")


def _some(shard: int) -> list[str]:
    """Another sample every day, so that in time every row is judged again."""
    names = sorted(name for name, row in ROWS.items() if row.samples)
    return random.Random(date.today().toordinal()).sample(names, 100)[shard::SHARDS]


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_rows_are_as_in_the_table(shard: int) -> None:
    found = {verdict.name: verdict for verdict in judge_all(_some(shard), judge, MOST, jobs=1)}
    differing = {name: (str(ROWS[name]), str(v)) for name, v in found.items() if not _matches(v, ROWS[name])}
    assert not differing


def _matches(verdict: Verdict, row: Verdict) -> bool:
    """Equal, or the part of it that fewer samples show."""
    if row.samples <= MOST:
        counted = replace(verdict, reason=row.reason, confirmed=row.confirmed)
        return counted == row
    return verdict.outcome in (row.outcome, "exact", "no oracle") and set(verdict.served) <= set(row.served)
