"""The scenarios of `make bench`, in the order in which they run."""

from ..scenario import Scenario
from .amqp import AMQP
from .at_rest import IDLE, MEMORY
from .bodies_http import BODIES_HTTP
from .growth import BACKENDS, ROUTES
from .handles import HANDLES
from .million import MILLION
from .noop_http import NOOP_HTTP
from .overload import OVERLOAD
from .slow_handlers import BATCHING, REPLICAS
from .streaming import STREAMING
from .submission import SUBMISSION

SCENARIOS: tuple[Scenario, ...] = (
    NOOP_HTTP, BODIES_HTTP, HANDLES, SUBMISSION, REPLICAS, BATCHING, BACKENDS, ROUTES, AMQP, OVERLOAD, STREAMING, MEMORY, IDLE,
)  # fmt: skip
BY_NAME_ONLY: tuple[Scenario, ...] = (MILLION,)
"""Those that run when `--only` names them."""
