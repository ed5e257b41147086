"""How much is tested: ``--every`` compiles every model; ``--hypothesis-profile=thorough`` looks at more."""

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "quick", max_examples=10, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=400, derandomize=False)
settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", action="store_true", help="compile every model, not only one of each kind")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of ``compiled`` runs for its module's COMPILED, or for all of its CASES."""
    if "compiled" in metafunc.fixturenames and hasattr(metafunc.module, "COMPILED"):
        chosen = metafunc.module.CASES if metafunc.config.getoption("--every") else metafunc.module.COMPILED
        metafunc.parametrize("compiled", list(chosen))
