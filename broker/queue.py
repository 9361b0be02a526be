"""The queue: what RabbitMQ does for us, as an interface with two implementations (`rabbitmq/queue.py`, `memory/queue.py`).

Nothing here awaits per message: a publish is told its fate by a callback, a delivery is handed over by one, and acks are
joined into one write per loop turn. All of it belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from .dead_letters import DeadLetter, Death
from .envelope import Envelope
from .errors import BrokerUnavailable, MQServeError

Settled = Callable[[MQServeError | None], None]
"""Called once: with None when the broker has taken the message, else with what went wrong
(Overloaded, NotRouted, BrokerUnavailable)."""


async def fate_of(publish: Callable[[Settled], None], budget_s: float) -> MQServeError | None:
    """Publishes, and waits for what becomes of it: None when the broker has taken it. Late is BrokerUnavailable, too."""
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
    """One message in a replica's hands; it ends in exactly one of `ack` and `requeue`."""

    @property
    def redelivered(self) -> bool: ...

    def envelope(self) -> Envelope:
        """Raises BadEnvelope for bytes that will never parse."""
        ...

    def ack(self) -> None:
        """Settled for good. On a connection that died in between nothing happens, and the broker delivers it again."""
        ...

    def requeue(self) -> None:
        """Back to the queue, at its old place as far as possible."""
        ...


class Consumption(Protocol):
    """One consumer of one queue, restored by itself after the connection was lost."""

    def set_prefetch(self, prefetch: int) -> None:
        """At most this many unsettled deliveries from now on, beside those held at the change; takes effect soon."""
        ...

    async def cancel(self) -> None:
        """Once it returns no delivery follows; the ones in hand can still be settled. Idempotent."""
        ...


class DeadLetters(Protocol):
    """The dead letters of one backend in this process's hands: what it does not remove is back a moment after it lets go, or dies."""

    @property
    def waiting(self) -> int:
        """How many there were at the beginning, without those in other hands: what dies later is not taken."""
        ...

    def __aiter__(self) -> AsyncIterator[DeadLetter]:
        """Each once, in the order of their deaths but for one. To be gone through once."""
        ...

    async def remove(self, letter: DeadLetter) -> None:
        """For good, at the latest when the context ends without an error."""
        ...


class Queue(Protocol):
    """One process's way to the broker."""

    @property
    def down_s(self) -> float:
        """For how long the broker has taken no messages; 0 while it does."""
        ...

    @property
    def why_down(self) -> str:
        """For operators, as far as it is known; empty while the broker takes messages."""
        ...

    @property
    def trouble(self) -> str:
        """Why it takes no messages, in words for anybody; empty while it does."""
        ...

    def publish(self, backend: str, envelope: Envelope, settled: Settled) -> None:
        """To the backend's queue. Raises TooLarge before anything is sent."""
        ...

    def reply(self, envelope: Envelope, reply_to: str, settled: Settled) -> None:
        """To a caller's own AMQP queue; a queue that is gone is no error."""
        ...

    def dead_letter(self, backend: str, delivery: Delivery, death: Death, settled: Settled) -> None:
        """The message as it came to the backend's dead letters, with what it died of. Ack the delivery once it is settled."""
        ...

    def dead_letters(self, backend: str, at_most: int | None = None) -> AbstractAsyncContextManager[DeadLetters]:
        """Takes them into this process's hands, one by one. Raises UnknownBackend where there never were any."""
        ...

    def republish(self, letter: DeadLetter, settled: Settled) -> None:
        """The message of a dead letter to its backend's queue; the letter stays until it is removed."""
        ...

    async def consume(self, backend: str, generation: int, prefetch: int, on_delivery: Callable[[Delivery], None]) -> Consumption:
        """Returns once the broker sends deliveries; raises BrokerUnavailable after our budget."""
        ...

    async def declare(self, backend: str, generation: int, max_length: int | None) -> None:
        """The generation's queue and the dead letters exist and are bound after this. Idempotent."""
        ...

    async def unbind(self, backend: str, generation: int) -> None:
        """Nothing new arrives in this generation. Idempotent."""
        ...

    async def depth(self, backend: str, generation: int) -> int | None:
        """The number of ready messages, None when there is no such queue."""
        ...

    async def count_dead(self, backend: str) -> int | None:
        """The number of its dead letters that nobody looks at, None when there is no queue of them."""
        ...

    async def delete(self, backend: str, generation: int, *, only_if_empty: bool) -> bool:
        """Whether the queue is gone. Without `only_if_empty` the backend is gone too: its dead letters stay for operators, an empty
        queue of them does not."""
        ...

    async def close(self) -> None: ...
