"""Models of the transformers package with a dynamic batch and length."""

import pytest

from tests.models.test_dynamic_shapes import check_dynamic
from tests.models.test_transformers import CASES

#: What does not hold yet, and why.
OPEN = {
    "pvt": "with dynamic dimensions random numbers are drawn in another order than the model draws them",
    "gemma3": "another specialisation is made after a run of the model itself",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "gpt2" else pytest.mark.slow) for n in CASES])
def test_eager(name: str, request: pytest.FixtureRequest) -> None:
    if name in OPEN:
        request.applymarker(pytest.mark.xfail(reason=OPEN[name]))
    check_dynamic(CASES[name].problem())
