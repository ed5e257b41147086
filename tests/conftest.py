"""Profiles of the property-based tests: ``pytest --hypothesis-profile=thorough`` looks much longer, at new examples."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "quick", max_examples=10, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=400, derandomize=False)
settings.load_profile("quick")
