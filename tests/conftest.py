"""How much is tested: ``--every`` runs and compiles every model; ``--hypothesis-profile=thorough`` looks at more."""

import os
from datetime import date

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "quick", max_examples=10, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=400, derandomize=False)
settings.load_profile("quick")


TURN, TURNS = "FOMOH_FX_TURN", 7


def pytest_configure() -> None:
    """Whose turn it is today; processes that are started later inherit it, though midnight may have passed."""
    os.environ.setdefault(TURN, str(date.today().toordinal() % TURNS))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every",
        action="store_true",
        help="run every model, and compile it, not only a seventh of them and one of each kind",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of ``compiled`` runs for its module's COMPILED, or for all of its CASES."""
    if "compiled" in metafunc.fixturenames and hasattr(metafunc.module, "COMPILED"):
        chosen = metafunc.module.CASES if metafunc.config.getoption("--every") else metafunc.module.COMPILED
        metafunc.parametrize("compiled", list(chosen))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the tests marked ``by_turns`` another seventh runs every day, unless they are asked for one by one."""
    if config.getoption("--every") or any("::" in argument for argument in config.args):
        return
    taking_turns = [item for item in items if item.get_closest_marker("by_turns")]
    left_out = set(taking_turns) - set(taking_turns[int(os.environ[TURN]) :: TURNS])
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
