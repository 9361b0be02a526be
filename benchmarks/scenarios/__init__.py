"""The scenarios of `make bench`, in the order in which they run."""

from ..scenario import Scenario
from .bodies_http import BODIES_HTTP
from .handles import HANDLES
from .noop_http import NOOP_HTTP

SCENARIOS: tuple[Scenario, ...] = (NOOP_HTTP, BODIES_HTTP, HANDLES)
