"""How long a job may run: no longer than the broker lets a replica hold its message."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..broker.errors import BadValue
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from .state.documents import Backend, Desired
from .state.reading import read_observed

MARGIN_S = 300  # for what comes before the run, and until RabbitMQ, which looks once a minute, has seen the ack
_PER_QUEUE_SINCE = (3, 12)  # from this version on, RabbitMQ heeds the timeout of the queue


def job_limit_s(broker_version: str, consumer_timeout_s: float) -> int:
    """Returns the longest run, in seconds; 0 where the queue's own timeout is long enough for any, or the version is not known.
    `consumer_timeout_s` is what operators say of RabbitMQ's configuration."""
    numbers = tuple(map(int, re.findall(r"\d+", broker_version)[:2]))
    return max(1, int(consumer_timeout_s) - MARGIN_S) if numbers and numbers < _PER_QUEUE_SINCE else 0


def job_problems(desired: Desired, limit_s: int) -> dict[str, str]:
    """Returns the backends whose jobs may run longer than that, with the mend."""
    return {backend.name: too_long(backend, limit_s) for backend in _above(desired, limit_s)}


async def check_job_timeouts(store: Store, keys: StoreKeys, old: Desired, new: Desired) -> None:
    """Raises BadValue if a backend that a change makes or changes has jobs that may run too long."""
    changed = {name: backend for name, backend in new.backends.items() if backend is not old.backends.get(name)}
    if any("job_timeout_s" in backend.settings for backend in changed.values()):
        limit_s = read_observed(await store.get(keys.observed)).job_limit_s
        for backend in _above(new, limit_s):
            if backend.name in changed:
                raise BadValue(f"backend {backend.name!r}: {too_long(backend, limit_s)}")


def too_long(backend: Backend, limit_s: int) -> str:
    return (
        f"job_timeout_s is {backend.config.job_timeout_s:g}, and a RabbitMQ before 3.12 takes a job back unless that is {limit_s} at most: "
        "lower it; or raise consumer_timeout in rabbitmq.conf, and tell the controllers by MQSERVE_CONSUMER_TIMEOUT_S"
    )


def _above(desired: Desired, limit_s: int) -> Iterator[Backend]:
    for backend in desired.backends.values() if limit_s else ():
        if backend.settings.get("job_timeout_s", 0) > limit_s:  # the default is lowered to the limit
            yield backend
