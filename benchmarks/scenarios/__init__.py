"""The scenarios of `make bench`, in the order in which they run."""

from ..scenario import Scenario
from .noop_http import NOOP_HTTP

SCENARIOS: tuple[Scenario, ...] = (NOOP_HTTP,)
