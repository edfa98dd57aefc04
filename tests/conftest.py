"""Hypothesis must not fail a slow machine for being slow."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "shared", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("shared")
