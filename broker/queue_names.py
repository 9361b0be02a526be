"""Every exchange, queue and routing key on the broker, in one place.

| name                          | kind                     | declared by | written by            | read by   |
|-------------------------------|--------------------------|-------------|-----------------------|-----------|
| `{ns}.requests`               | direct exchange, durable | controller  | proxies, handles, all | -         |
| `{ns}.backend.{name}.{gen}`   | classic queue, durable   | controller  | -                     | replicas  |
| `{ns}.backend.{name}.{gen}#1` | the same, second shard   | controller  | -                     | replicas  |
| `{ns}.jobs`                   | direct exchange, durable | controller  | proxies, handles, all | -         |
| `{ns}.jobs.{name}.{gen}`      | classic queue, durable   | controller  | -                     | replicas  |
| `{ns}.later`                  | direct exchange, durable | controller  | all but nodes         | -         |
| `{ns}.endpoints`              | topic exchange, durable  | controller  | direct publishers     | -         |
| `{ns}.due`                    | classic queue, durable   | controller  | -                     | leader    |
| `{ns}.later.{seconds}`        | quorum queue             | controller  | -                     | - : they expire to `{ns}.due` |
| `{ns}.webhooks`               | direct exchange, durable | controller  | controllers           | -         |
| `{ns}.webhooks`               | classic queue, durable   | controller  | -                     | controllers |
| `{ns}.webhooks.{seconds}`     | quorum queue             | controller  | -                     | - : they expire to `{ns}.webhooks` |
| `{ns}.webhooks.dead`          | classic queue, durable   | controller  | -                     | operators |
| `{ns}.dead`                   | direct exchange, durable | controller  | replicas              | -         |
| `{ns}.dead.{name}`            | classic queue, durable   | controller  | -                     | operators |
| `{ns}.dead.@endpoints`        | the same                 | controller  | -                     | operators |

The routing key is the backend's name on these exchanges, except for `{ns}.endpoints`: the endpoint's name; and for `{ns}.later` and
`{ns}.webhooks`: `due`, `dead`, or how many seconds a message waits. A backend with `queue_shards` has more queues: shard 1 has the routing
key `{name}#1`, and so on. No name of a backend contains a `#`, or an `@`. `{ns}.due` gets what is published to `{ns}.endpoints`, too.
"""

from __future__ import annotations

import re

from .errors import BadValue

_NAMESPACE = re.compile(r"[a-z0-9-]{1,40}")
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,100}")

DEAD_LETTER_LIMIT = 10_000
DEAD_LETTER_TTL_MS = 7 * 24 * 3600 * 1000
MAX_PRIORITY = 4
DUE_KEY = "due"
DEAD_KEY = "dead"
ENDPOINTS = "@endpoints"  # stands for a backend at the dead letters of those who published to an endpoint
JOB_UNACKED_MS = 8 * 24 * 3600 * 1000  # for how long a replica may hold a job: longer than the longest run, and all that comes before it


def check_namespace(namespace: str) -> str:
    if not _NAMESPACE.fullmatch(namespace):
        raise BadValue(f"{namespace!r} is no namespace: use 1 to 40 of a-z, 0-9 and -, such as 'mqserve'")
    return namespace


def check_name(name: str, what: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadValue(f"{name!r} is no name for {what}: use 1 to 100 letters, digits and _ . : / -")
    return name


def requests_exchange(namespace: str) -> str:
    return f"{namespace}.requests"


def routing_key(backend: str, shard: int = 0) -> str:
    return f"{backend}#{shard}" if shard else backend


def backend_queue(namespace: str, backend: str, generation: int, shard: int = 0) -> str:
    return routing_key(f"{namespace}.backend.{backend}.{generation}", shard)


def jobs_exchange(namespace: str) -> str:
    return f"{namespace}.jobs"


def jobs_queue(namespace: str, backend: str, generation: int) -> str:
    return f"{namespace}.jobs.{backend}.{generation}"


def later_exchange(namespace: str) -> str:
    return f"{namespace}.later"


def later_queue(namespace: str, wait_s: int) -> str:
    return f"{namespace}.later.{wait_s}"


def endpoints_exchange(namespace: str) -> str:
    return f"{namespace}.endpoints"


def due_queue(namespace: str) -> str:
    return f"{namespace}.due"


def webhooks_exchange(namespace: str) -> str:
    return f"{namespace}.webhooks"


def webhooks_queue(namespace: str) -> str:
    return f"{namespace}.webhooks"


def webhooks_wait_queue(namespace: str, wait_s: int) -> str:
    return f"{namespace}.webhooks.{wait_s}"


def dead_webhooks_queue(namespace: str) -> str:
    return f"{namespace}.webhooks.dead"


def dead_exchange(namespace: str) -> str:
    return f"{namespace}.dead"


def dead_queue(namespace: str, backend: str) -> str:
    return f"{namespace}.dead.{backend}"


def is_ours(namespace: str, queue: str) -> bool:
    """Whether the queue belongs to this instance. A `reply_to` must not name such a queue."""
    return queue.startswith(f"{namespace}.")
