"""The same models on a GPU, against reverse-over-reverse there."""

import pytest
import torch

import fomoh_fx
from tests.models.checking import check
from tests.models.models import PROBLEMS
from tests.models.test_torch_models import CASES, COMPILED  # noqa: F401  which models are compiled

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def check_on_gpu(name, **options):
    """Differences are taken on the CPU: kernels there are the more exact ones."""
    problem = PROBLEMS[name]().to("cuda")
    try:
        problem.loss(problem.model(*problem.args, **problem.kwargs), *problem.targets)
    except RuntimeError as error:
        if "device" in str(error):
            pytest.skip(f"the model itself does not run there: {error}")
        raise
    true = PROBLEMS[name]() if problem.truth == "difference" else None
    check(PROBLEMS[name]().to("cuda"), true=true, **options)


@pytest.mark.parametrize("name", PROBLEMS)
def test_eager(name):
    check_on_gpu(name)


@pytest.mark.slow
def test_compiled(compiled):
    with torch._inductor.config.patch(fallback_random=True):
        check_on_gpu(compiled, lower=fomoh_fx.compile)
