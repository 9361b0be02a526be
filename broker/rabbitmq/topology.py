"""Exchanges, queues and bindings on RabbitMQ, which only the controller declares and queries."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import aiormq
from aiormq.channel import Channel

from .. import queue_names
from ..errors import BrokerUnavailable, MQServeError, QueueMismatch, words_of
from ..shards import shares
from .connection import MEND, OPERATION_BUDGET_S, Link, close_channel, really_cancelled
from .refusals import broker_refusal

T = TypeVar("T")

_CLOSE_BUDGET_S = 1.0
# Explicit, although it is the default: a virtual host may have another default, and quorum queues have no priorities.
_CLASSIC: dict[str, Any] = {"x-queue-type": "classic"}
_JOBS: dict[str, Any] = {**_CLASSIC, "x-max-priority": queue_names.MAX_PRIORITY}
# A classic queue drops what it has moved before that is on disk, so a crash of RabbitMQ loses what was moved in the last seconds.
_MOVING_ONCE_ON_DISK: dict[str, Any] = {
    "x-queue-type": "quorum",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}
_TIMEOUT = "x-consumer-timeout"
_UNACKED: dict[str, Any] = {_TIMEOUT: queue_names.JOB_UNACKED_MS}
_DEAD: dict[str, Any] = {**_CLASSIC, "x-max-length": queue_names.DEAD_LETTER_LIMIT, "x-message-ttl": queue_names.DEAD_LETTER_TTL_MS}


class RabbitTopology:
    """The topology half of `Queue`. It uses the publishing connection."""

    def __init__(self, link: Link, namespace: str) -> None:
        self._link = link
        self._namespace = namespace
        self._requests = queue_names.requests_exchange(namespace)
        self._jobs = queue_names.jobs_exchange(namespace)
        self._tells_timeout = True  # whether queues for jobs are declared with `x-consumer-timeout`

    def __repr__(self) -> str:
        return f"<RabbitTopology of {self._namespace!r}>"

    def _names(self, backend: str, generation: int, shards: int) -> list[str]:
        """All queues of a generation, in the order in which they are declared."""
        waits = [queue_names.backend_queue(self._namespace, backend, generation, shard) for shard in range(shards)]
        return [*waits, queue_names.jobs_queue(self._namespace, backend, generation)]

    async def declare(self, backend: str, generation: int, max_length: int | None, shards: int) -> None:
        """Declares the queues from the first to the last and then that for jobs, and `delete` deletes them in the opposite order. So there
        is never a gap, `count_shards` finds all of them, and no queue for jobs is left without them."""
        await self.declare_dead_letters(backend)
        lengths = [None] * shards if max_length is None else shares(max_length, shards)

        async def declare(channel: Channel) -> None:
            await channel.exchange_declare(self._requests, exchange_type="direct", durable=True)
            for shard, length in enumerate(lengths):
                name = queue_names.backend_queue(self._namespace, backend, generation, shard)
                await channel.queue_declare(name, durable=True, arguments=_arguments(length))
                await channel.queue_bind(name, self._requests, queue_names.routing_key(backend, shard))

        try:
            await self._on_own_channel(declare)
            await self._declare_jobs(backend, generation)
        except aiormq.exceptions.ChannelPreconditionFailed as error:
            if " for exchange '" in str(error):  # the name cannot fake this: names hold no space and no quote
                raise _foreign(error) from error
            raise QueueMismatch(f"generation {generation} of the queue of {backend!r} exists with other arguments") from error

    async def _declare_jobs(self, backend: str, generation: int) -> None:
        """RabbitMQ 4.3.2 and later refuse the timeout for a classic queue, which has none there; versions before need it. A queue that an
        earlier version made has it, whatever the version is now. So a refusal of it is followed by the other form, which is kept."""
        name = queue_names.jobs_queue(self._namespace, backend, generation)

        async def declare(channel: Channel) -> None:
            await channel.exchange_declare(self._jobs, exchange_type="direct", durable=True)
            await channel.queue_declare(name, durable=True, arguments={**_JOBS, **(_UNACKED if self._tells_timeout else {})})
            await channel.queue_bind(name, self._jobs, backend)

        try:
            await self._on_own_channel(declare)
        except aiormq.exceptions.ChannelPreconditionFailed as error:
            if _TIMEOUT not in str(error):
                raise
            self._tells_timeout = not self._tells_timeout
            await self._on_own_channel(declare)

    async def declare_due(self) -> None:
        due, later = queue_names.due_queue(self._namespace), queue_names.later_exchange(self._namespace)
        endpoints = queue_names.endpoints_exchange(self._namespace)

        async def declare(channel: Channel) -> None:
            for exchange in (later, self._jobs):  # the latter may be gone with all backends, and to publish to it would close the channel
                await channel.exchange_declare(exchange, exchange_type="direct", durable=True)
            await channel.queue_declare(due, durable=True, arguments=_CLASSIC)
            await channel.queue_bind(due, later, queue_names.DUE_KEY)
            await channel.exchange_declare(endpoints, exchange_type="topic", durable=True)  # so that rights may depend on the routing key
            await channel.queue_bind(due, endpoints, "#")

        await self._declare(declare)
        await self.declare_dead_letters(queue_names.ENDPOINTS)

    async def declare_webhooks(self) -> int:
        """Returns how many dead ones there are."""
        exchange, due = queue_names.webhooks_exchange(self._namespace), queue_names.webhooks_queue(self._namespace)
        dead = queue_names.dead_webhooks_queue(self._namespace)

        async def declare(channel: Channel) -> int:
            await channel.exchange_declare(exchange, exchange_type="direct", durable=True)
            await channel.queue_declare(due, durable=True, arguments=_CLASSIC)
            await channel.queue_bind(due, exchange, queue_names.DUE_KEY)
            declared = await channel.queue_declare(dead, durable=True, arguments=_DEAD)
            await channel.queue_bind(dead, exchange, queue_names.DEAD_KEY)
            return declared.message_count or 0

        return await self._declare(declare)

    async def declare_wait(self, name: str, exchange: str, wait_s: int) -> None:
        """The queue has no `x-expires`: declaring a quorum queue again does not renew that, and what is in the queue is lost with it."""
        arguments: dict[str, Any] = {
            **_MOVING_ONCE_ON_DISK,
            "x-message-ttl": wait_s * 1000,
            "x-dead-letter-exchange": exchange,
            "x-dead-letter-routing-key": queue_names.DUE_KEY,
        }

        async def declare(channel: Channel) -> None:
            await channel.queue_declare(name, durable=True, arguments=arguments)
            await channel.queue_bind(name, exchange, str(wait_s))

        await self._declare(declare)

    async def declare_dead_letters(self, backend: str) -> None:
        async def declare(channel: Channel) -> None:
            dead, name = queue_names.dead_exchange(self._namespace), queue_names.dead_queue(self._namespace, backend)
            await channel.exchange_declare(dead, exchange_type="direct", durable=True)
            await channel.queue_declare(name, durable=True, arguments=_DEAD)
            await channel.queue_bind(name, dead, backend)

        await self._declare(declare)

    async def _declare(self, declare: Callable[[Channel], Awaitable[T]]) -> T:
        try:
            return await self._on_own_channel(declare)
        except aiormq.exceptions.ChannelPreconditionFailed as error:
            raise _foreign(error) from error

    async def count_shards(self, backend: str, generation: int, known: int) -> int:
        while await self._count(queue_names.backend_queue(self._namespace, backend, generation, known)) is not None:
            known += 1
        return known

    async def unbind(self, backend: str, generation: int, shards: int) -> None:
        for shard in range(shards):
            name = queue_names.backend_queue(self._namespace, backend, generation, shard)
            await self.unbind_queue(name, self._requests, queue_names.routing_key(backend, shard))
        await self.unbind_queue(queue_names.jobs_queue(self._namespace, backend, generation), self._jobs, backend)

    async def unbind_queue(self, name: str, exchange: str, key: str) -> None:
        async def unbind(channel: Channel) -> None:
            await channel.queue_unbind(name, exchange, key)

        with suppress(aiormq.exceptions.ChannelNotFoundEntity):
            await self._on_own_channel(unbind)

    async def depth(self, backend: str, generation: int, shards: int) -> int | None:
        counts = [count for count in await self.count_all(self._names(backend, generation, shards)) if count is not None]
        return sum(counts) if counts else None

    async def count_jobs(self, backend: str, generation: int) -> int | None:
        return await self._count(queue_names.jobs_queue(self._namespace, backend, generation))

    async def count_dead(self, backend: str) -> int | None:
        return await self._count(queue_names.dead_queue(self._namespace, backend))

    async def _count(self, name: str) -> int | None:
        return (await self.count_all([name]))[0]

    async def count_all(self, names: Sequence[str]) -> list[int | None]:
        """Returns the number of ready messages in each queue, None for one that is not there, which costs its channel."""
        counts: list[int | None] = []

        async def count(channel: Channel) -> None:
            while len(counts) < len(names):
                counts.append((await channel.queue_declare(names[len(counts)], passive=True)).message_count)

        while len(counts) < len(names):
            try:
                await self._on_own_channel(count)
            except aiormq.exceptions.ChannelNotFoundEntity:
                counts.append(None)
        return counts

    async def delete(self, backend: str, generation: int, shards: int, *, only_if_empty: bool) -> bool:
        names = self._names(backend, generation, shards)
        if only_if_empty and any(await self.count_all(names)):  # otherwise the empty ones would be gone before the one that is not
            return False
        for name in reversed(names):
            if not await self.delete_queue(name, only_if_empty=only_if_empty):
                return False
        if not only_if_empty:
            await self.delete_empty([queue_names.dead_queue(self._namespace, backend)])
        return True

    async def delete_queue(self, name: str, *, only_if_empty: bool) -> bool:
        """Returns False for a queue that is in use, or not empty. One that is not there counts as deleted."""

        async def delete(channel: Channel) -> None:
            await channel.queue_delete(name, if_unused=only_if_empty, if_empty=only_if_empty)

        try:
            await self._on_own_channel(delete)
        except aiormq.exceptions.ChannelNotFoundEntity:
            return True
        except aiormq.exceptions.ChannelPreconditionFailed:
            return False
        return True

    async def delete_empty(self, names: Sequence[str]) -> None:
        """Deletes the queues in this order, up to the first one that is in use, or not empty."""

        async def delete(channel: Channel) -> None:
            for name in names:
                await channel.queue_delete(name, if_unused=True, if_empty=True)

        with suppress(aiormq.exceptions.ChannelNotFoundEntity, aiormq.exceptions.ChannelPreconditionFailed):
            await self._on_own_channel(delete)

    async def _on_own_channel(self, act: Callable[[Channel], Awaitable[T]]) -> T:
        """Runs `act` on a channel of its own, since any failed operation closes its channel. Raises BrokerUnavailable whatever form
        RabbitMQ's silence takes."""
        try:
            connection = await self._link.up()
            async with asyncio.timeout(OPERATION_BUDGET_S):
                channel = await connection.open_channel(confirms=False)
                try:
                    return await act(channel)
                finally:
                    await close_channel(channel, _CLOSE_BUDGET_S)
        except (aiormq.exceptions.ChannelNotFoundEntity, aiormq.exceptions.ChannelPreconditionFailed, MQServeError):
            raise
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and really_cancelled():
                raise
            refusal = broker_refusal(error)
            raise BrokerUnavailable(refusal or f"{self._link.server} did not answer ({words_of(error)}); {MEND}") from error


def _arguments(max_length: int | None) -> dict[str, Any]:
    limit = {} if max_length is None else {"x-max-length": max_length}
    return {**_CLASSIC, "x-max-priority": queue_names.MAX_PRIORITY, "x-overflow": "reject-publish", **limit}


def _foreign(error: Exception) -> MQServeError:
    return MQServeError(
        f"RabbitMQ has an exchange or a queue under a name of ours that is not as we make it ({words_of(error)}): "
        "empty what is in it, delete it, and it is made again"
    )
