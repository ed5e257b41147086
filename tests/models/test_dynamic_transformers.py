"""Models of the transformers package with a dynamic batch and length."""

import pytest

from fomoh_fx.errors import UnsupportedOpError
from tests.models.test_dynamic_shapes import check_dynamic
from tests.models.test_transformers import CASES

#: What does not hold yet.
SHORT = {
    "lfm2-vl": pytest.mark.xfail(
        raises=UnsupportedOpError, strict=True, reason="with a dynamic batch, rules guard on sizes that data decide"
    )
}
MARKS = {n: [pytest.mark.slow, pytest.mark.by_turns, *([SHORT[n]] if n in SHORT else [])] for n in CASES if n != "gpt2"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, [])) for n in CASES])
def test_eager(name: str) -> None:
    check_dynamic(CASES[name].problem())
