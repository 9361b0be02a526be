"""Jobs that wait for their time, and those that were published to an endpoint.

Each travels with the header `mq-to`, which names its backend, to the queue `<ns>.due`. The leading controller takes it from there: if its
time has come it goes to the jobs of its backend, else into a queue whose messages RabbitMQ moves back to `<ns>.due` after 1, 2, 4, … s.
In memory timers of the event loop stand for the latter.

What is published to the exchange `<ns>.endpoints` comes to the same queue, with the endpoint's name as its routing key.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol

import msgspec

from .dead_letters import Death
from .envelope import Envelope
from .queue import Consumption
from .values.header_seals import BackendSeals

LONGEST_WAIT_S = 2**20  # a job that waits for longer waits again
WAITS_S = tuple(2**exponent for exponent in range(21))

_TO = b"\x05mq-toS"
_pack_length = struct.Struct(">I").pack


def longest_wait_s(left_ms: int) -> int:
    """Returns for how long a job waits next, of which `left_ms` are left until its time: the longest of WAITS_S that is not longer. Below a
    second it is that, so a job comes up to a second late, and never early."""
    return min(LONGEST_WAIT_S, 1 << max(1, left_ms // 1000).bit_length() - 1)


class LaterEnvelope(Envelope, frozen=True):
    """A job on its way to the queue `<ns>.due`, with the header `mq-to`. Its seal is that of a message to its backend."""

    to: str = ""

    def _table(self, seals: BackendSeals | None) -> bytes:
        to = self.to.encode()
        return Envelope._table(self, seals) + _TO + _pack_length(len(to)) + to


def addressed(envelope: Envelope, backend: str) -> LaterEnvelope:
    """Returns the envelope of a job for that backend as one that waits first."""
    return LaterEnvelope(**msgspec.structs.asdict(envelope), to=backend)


class DueJob(Protocol):
    """One message of `<ns>.due`, unacked. It ends with exactly one call of `ack` or `requeue`."""

    @property
    def endpoint(self) -> str | None:
        """The routing key of a message that was published to the exchange for endpoints; None for others."""
        ...

    @property
    def backend(self) -> str:
        """The backend that it is for, as `mq-to` says, which anybody may have written; empty if that is no name, and for a message to an
        endpoint."""
        ...

    @property
    def wants_events(self) -> bool:
        """See `Delivery.wants_events`."""
        ...

    def envelope(self) -> Envelope:
        """The envelope, its seal checked as of a message to that backend; one to an endpoint has none. Raises BadEnvelope."""
        ...

    def ack(self) -> None: ...

    def requeue(self) -> None: ...


class Later(Protocol):
    """The queues on the broker in which jobs wait for their time, for the leading controller. Everybody else only publishes
    (`Queue.publish_later`)."""

    async def declare(self) -> int:
        """Makes sure that `<ns>.due` exists and is bound, also to the exchange for endpoints, and that their dead letters have a queue.
        Idempotent. Returns how many of these there are."""
        ...

    async def delete_if_empty(self) -> None:
        """Deletes `<ns>.due` and the queues that lead there, unless a job waits in one of them, and the queue of the dead letters of
        endpoints unless there is one."""
        ...

    async def consume(self, prefetch: int, on_due: Callable[[DueJob], None]) -> Consumption:
        """Consumes `<ns>.due`. Raises BrokerUnavailable after our budget."""
        ...

    async def forward(self, job: DueJob) -> None:
        """Has the broker confirm the message among the jobs of its backend. Raises NotRouted, and the broker's errors."""
        ...

    async def wait(self, job: DueJob, left_ms: int) -> bool:
        """Has the broker confirm the message where it waits for so long, or for a part of that. Returns False if there is no such place
        yet: then a part of the time has passed, and the broker has the message nowhere else. Raises the broker's errors."""
        ...

    async def set_aside(self, job: DueJob, death: Death) -> None:
        """Has the broker confirm the message among the dead letters of its backend, which may be gone, or among those of endpoints. Raises
        the broker's errors."""
        ...
