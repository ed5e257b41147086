"""Models of the transformers package with a dynamic batch and length."""

import pytest

from tests.models.test_dynamic_shapes import check_dynamic
from tests.models.test_transformers import CASES

MARKS = {n: [pytest.mark.slow, pytest.mark.by_turns] for n in CASES if n != "gpt2"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, [])) for n in CASES])
def test_eager(name: str) -> None:
    check_dynamic(CASES[name].problem())
