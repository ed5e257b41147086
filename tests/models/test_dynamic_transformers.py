"""Models of the transformers package with a dynamic batch and length."""

import pytest

from tests.models.test_dynamic_shapes import check_dynamic
from tests.models.test_transformers import CASES


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "gpt2" else pytest.mark.slow) for n in CASES])
def test_eager(name: str) -> None:
    check_dynamic(CASES[name].problem())
