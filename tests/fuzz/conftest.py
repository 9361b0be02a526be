"""How long hypothesis looks: the same examples every time in `make test`, others every time in `make fuzz`.

Neither has a deadline, since a noisy machine is no finding, nor a database: what ever failed is kept in `corpus/`, by name.
"""

import os

from hypothesis import HealthCheck, settings

NOISE = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.function_scoped_fixture)

settings.register_profile(
    "quick", max_examples=150, derandomize=True, database=None, deadline=None, print_blob=True, suppress_health_check=NOISE
)
settings.register_profile("long", max_examples=20_000, database=None, deadline=None, print_blob=True, suppress_health_check=NOISE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
