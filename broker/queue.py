"""The queue: the part of RabbitMQ that we use, as an interface with two implementations (`rabbitmq/queue.py`, `memory/queue.py`).

No method awaits per message: a callback reports the outcome of a publish, a callback receives each delivery, and acks are joined into one
write per loop turn. Each queue object belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Protocol

from .dead_letters import DeadLetter, Death
from .envelope import Envelope
from .errors import BrokerUnavailable, MQServeError

if TYPE_CHECKING:
    from .later import Later
    from .webhooks import Webhooks

Settled = Callable[[MQServeError | None], None]
"""Called once with the outcome of a publish: None when the broker has confirmed the message, else the error (Overloaded, NotRouted,
BrokerUnavailable)."""


async def fate_of(publish: Callable[[Settled], None], budget_s: float) -> MQServeError | None:
    """Publishes, and returns the outcome: None when the broker has confirmed the message, else the error. No confirm within the budget is
    BrokerUnavailable."""
    fate: asyncio.Future[MQServeError | None] = asyncio.get_running_loop().create_future()

    def settled(error: MQServeError | None) -> None:
        if not fate.done():
            fate.set_result(error)

    publish(settled)
    try:
        async with asyncio.timeout(budget_s):
            return await fate
    except TimeoutError:
        return BrokerUnavailable(f"RabbitMQ did not confirm a message within {budget_s:g} s", maybe_sent=True)


class Delivery(Protocol):
    """One unacked message of this replica. It ends with exactly one call of `ack` or `requeue`."""

    @property
    def redelivered(self) -> bool: ...

    @property
    def wants_events(self) -> bool:
        """Whether its sender asks for messages about its job before the reply. It cannot be asked of bytes that do not parse."""
        ...

    def envelope(self) -> Envelope:
        """Raises BadEnvelope for bytes that will never parse."""
        ...

    def ack(self) -> None:
        """Acks the message, which settles it for good. If the connection is lost first, nothing happens, and the broker redelivers it."""
        ...

    def requeue(self) -> None:
        """Returns the message to the queue, at its old place as far as possible."""
        ...


class Consumption(Protocol):
    """One consumer of one queue. It restores itself after the connection is lost."""

    def set_prefetch(self, prefetch: int) -> None:
        """Sets the limit of unsettled deliveries from now on, beside those held at the change. Takes effect soon, not at once."""
        ...

    async def cancel(self) -> None:
        """Stops the consumer. After it returns no delivery arrives; deliveries in hand can still be settled. Idempotent."""
        ...


class DeadLetters(Protocol):
    """The dead letters of one backend, unacked in this process. Letters that it does not remove return to the queue when the context ends
    or the process dies."""

    @property
    def waiting(self) -> int:
        """The number of letters at the start, without those that other consumers hold. Letters that arrive later are not taken."""
        ...

    @property
    def is_read_elsewhere(self) -> bool:
        """Whether another consumer read these letters at the start, which may hold some."""
        ...

    def __aiter__(self) -> AsyncIterator[DeadLetter]:
        """Yields each letter once, oldest first, except that RabbitMQ's oldest comes last. Iterate only once."""
        ...

    async def remove(self, letter: DeadLetter) -> None:
        """Removes the letter for good, at the latest when the context ends without an error."""
        ...


class Queue(Protocol):
    """One process's access to the broker.

    A generation of a backend has `shards` queues, which all its replicas consume; in memory it has one in any case, since that is never
    the limit. `shard` names one of them, from 0. And it has one queue for jobs, without a limit of length, which comes and goes with it.
    """

    @property
    def broker_version(self) -> str:
        """The version of RabbitMQ, such as "3.10.8", as it said when it was connected last; empty before that, and in memory."""
        ...

    @property
    def later(self) -> Later:
        """The queues in which jobs wait for their time, for the leading controller."""
        ...

    @property
    def webhooks(self) -> Webhooks:
        """The queues of webhooks, for controllers."""
        ...

    @property
    def down_s(self) -> float:
        """For how long the broker has taken no messages; 0 while it does."""
        ...

    @property
    def why_down(self) -> str:
        """Why the broker takes no messages, for operators, as far as it is known; empty while it takes them."""
        ...

    @property
    def trouble(self) -> str:
        """Why the broker takes no messages, in words fit for strangers; empty while it takes them."""
        ...

    def publish(self, backend: str, envelope: Envelope, settled: Settled, shard: int = 0) -> None:
        """Publishes to one queue of the backend. Raises TooLarge before anything is sent."""
        ...

    def publish_job(self, backend: str, envelope: Envelope, settled: Settled) -> None:
        """Publishes to the backend's queue for jobs: as `publish`, and what the broker has confirmed survives its restart."""
        ...

    def publish_later(self, backend: str, envelope: Envelope, delay_s: float, settled: Settled) -> None:
        """Publishes a job that waits for its time first: until `header.job.not_before_ms`, which is `delay_s` from now: the queue in
        memory has no clock of the store. With RabbitMQ it may take a second more. Then the leading controller sends it on (`later`)."""
        ...

    def reply(self, envelope: Envelope, reply_to: str, settled: Settled) -> None:
        """Publishes to a caller's own AMQP queue. A queue that no longer exists is no error."""
        ...

    def dead_letter(self, backend: str, delivery: Delivery, death: Death, settled: Settled) -> None:
        """Publishes the message, unchanged, to the backend's dead letters, with the cause of its death. Ack the delivery once this is
        settled."""
        ...

    def dead_letters(self, backend: str, at_most: int | None = None) -> AbstractAsyncContextManager[DeadLetters]:
        """Takes the dead letters out one by one, unacked. Raises UnknownBackend if the backend has no queue of them."""
        ...

    def republish(self, letter: DeadLetter, settled: Settled) -> None:
        """Publishes a dead letter's message to its backend's queue, or to that for jobs if it came from there, or to its endpoint if it got
        no further. The letter stays until it is removed."""
        ...

    async def consume(
        self,
        backend: str,
        generation: int,
        prefetch: int,
        on_delivery: Callable[[Delivery], None],
        shards: int = 1,
        *,
        jobs: bool = False,
    ) -> Consumption:
        """Consumes all queues of the generation (with `jobs`: the one for jobs, and no other) and returns once the broker sends deliveries.
        The prefetch is divided among them, at least 1 for each. Raises BrokerUnavailable after our budget."""
        ...

    async def declare(self, backend: str, generation: int, max_length: int | None, shards: int = 1) -> None:
        """Makes sure that the generation's queues and the dead letter queue exist and are bound. `max_length` is divided among the queues;
        that for jobs has no limit. Idempotent. Raises QueueMismatch if one of them exists with other arguments."""
        ...

    async def count_shards(self, backend: str, generation: int, known: int = 0) -> int:
        """The number of queues that the generation has on the broker beside that for jobs, whatever its documents say. `known` ones are not
        looked for."""
        ...

    async def unbind(self, backend: str, generation: int, shards: int = 1) -> None:
        """Unbinds the generation's queues, so that no new message arrives in them. Idempotent."""
        ...

    async def depth(self, backend: str, generation: int, shards: int = 1) -> int | None:
        """The number of ready messages in all its queues, that for jobs included, or None if there is no such queue."""
        ...

    async def count_jobs(self, backend: str, generation: int) -> int | None:
        """The number of ready messages in its queue for jobs, or None if there is no such queue."""
        ...

    async def count_dead(self, backend: str) -> int | None:
        """The number of the backend's dead letters that no consumer holds, or None if it has no queue of them."""
        ...

    async def delete(self, backend: str, generation: int, shards: int = 1, *, only_if_empty: bool) -> bool:
        """Deletes the generation's queues, that for jobs first and then from the last to the first; returns whether all are gone. With
        `only_if_empty` none is deleted while one is not empty or in use; one that gets a message meanwhile stays, with those declared
        before it.
        Without, the backend is gone too: its dead letters stay for operators, but an empty queue of them is deleted."""
        ...

    async def close(self) -> None: ...
