"""Exchanges, queues and bindings on RabbitMQ, which only the controller declares and queries."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import aiormq
from aiormq.channel import Channel

from .. import queue_names
from ..errors import BrokerUnavailable, MQServeError, QueueMismatch, words_of
from ..shards import shares
from .connection import OPERATION_BUDGET_S, Link, really_cancelled
from .refusals import broker_refusal

T = TypeVar("T")

_CLOSE_BUDGET_S = 1.0
# Explicit, although it is the default: a virtual host may have another default, and quorum queues have no priorities.
_CLASSIC = {"x-queue-type": "classic"}


class RabbitTopology:
    """The topology half of `Queue`. It uses the publishing connection."""

    def __init__(self, link: Link, namespace: str) -> None:
        self._link = link
        self._namespace = namespace
        self._requests = queue_names.requests_exchange(namespace)

    def __repr__(self) -> str:
        return f"<RabbitTopology of {self._namespace!r}>"

    async def declare(self, backend: str, generation: int, max_length: int | None, shards: int) -> None:
        """Declares the queues from the first to the last, and `delete` deletes them from the last to the first. So there is never a gap,
        and `count_shards` finds all of them."""
        await self._declare_dead_letters(backend)
        lengths = [None] * shards if max_length is None else shares(max_length, shards)

        async def declare(channel: Channel) -> None:
            await channel.exchange_declare(self._requests, exchange_type="direct", durable=True)
            for shard, length in enumerate(lengths):
                name = queue_names.backend_queue(self._namespace, backend, generation, shard)
                await channel.queue_declare(name, durable=True, arguments=_arguments(length))
                await channel.queue_bind(name, self._requests, queue_names.routing_key(backend, shard))

        try:
            await self._on_own_channel(declare)
        except aiormq.exceptions.ChannelPreconditionFailed as error:
            if " for exchange '" in str(error):  # the name cannot fake this: names hold no space and no quote
                raise _foreign(error) from error
            raise QueueMismatch(f"generation {generation} of the queue of {backend!r} exists with other arguments") from error

    async def _declare_dead_letters(self, backend: str) -> None:
        arguments: dict[str, Any] = {
            **_CLASSIC,
            "x-max-length": queue_names.DEAD_LETTER_LIMIT,
            "x-message-ttl": queue_names.DEAD_LETTER_TTL_MS,
        }

        async def declare(channel: Channel) -> None:
            dead, name = queue_names.dead_exchange(self._namespace), queue_names.dead_queue(self._namespace, backend)
            await channel.exchange_declare(dead, exchange_type="direct", durable=True)
            await channel.queue_declare(name, durable=True, arguments=arguments)
            await channel.queue_bind(name, dead, backend)

        try:
            await self._on_own_channel(declare)
        except aiormq.exceptions.ChannelPreconditionFailed as error:
            raise _foreign(error) from error

    async def count_shards(self, backend: str, generation: int, known: int) -> int:
        while await self._count(queue_names.backend_queue(self._namespace, backend, generation, known)) is not None:
            known += 1
        return known

    async def unbind(self, backend: str, generation: int, shards: int) -> None:
        for shard in range(shards):
            await self._unbind(backend, generation, shard)

    async def _unbind(self, backend: str, generation: int, shard: int) -> None:
        name = queue_names.backend_queue(self._namespace, backend, generation, shard)

        async def unbind(channel: Channel) -> None:
            await channel.queue_unbind(name, self._requests, queue_names.routing_key(backend, shard))

        with suppress(aiormq.exceptions.ChannelNotFoundEntity):
            await self._on_own_channel(unbind)

    async def depth(self, backend: str, generation: int, shards: int) -> int | None:
        names = [queue_names.backend_queue(self._namespace, backend, generation, shard) for shard in range(shards)]
        counts = [count for name in names if (count := await self._count(name)) is not None]
        return sum(counts) if counts else None

    async def count_dead(self, backend: str) -> int | None:
        return await self._count(queue_names.dead_queue(self._namespace, backend))

    async def _count(self, name: str) -> int | None:
        async def count(channel: Channel) -> int | None:
            return (await channel.queue_declare(name, passive=True)).message_count

        try:
            return await self._on_own_channel(count)
        except aiormq.exceptions.ChannelNotFoundEntity:
            return None

    async def delete(self, backend: str, generation: int, shards: int, *, only_if_empty: bool) -> bool:
        for shard in reversed(range(shards)):
            name = queue_names.backend_queue(self._namespace, backend, generation, shard)
            if not await self._delete_queue(name, only_if_empty=only_if_empty):
                return False
        if not only_if_empty:
            await self._delete_empty_dead_letters(backend)
        return True

    async def _delete_queue(self, name: str, *, only_if_empty: bool) -> bool:
        async def delete(channel: Channel) -> None:
            await channel.queue_delete(name, if_unused=only_if_empty, if_empty=only_if_empty)

        try:
            await self._on_own_channel(delete)
        except aiormq.exceptions.ChannelNotFoundEntity:
            return True
        except aiormq.exceptions.ChannelPreconditionFailed:
            return False
        return True

    async def _delete_empty_dead_letters(self, backend: str) -> None:
        async def delete(channel: Channel) -> None:
            await channel.queue_delete(queue_names.dead_queue(self._namespace, backend), if_unused=True, if_empty=True)

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
                    with suppress(Exception):
                        await channel.close(timeout=_CLOSE_BUDGET_S)
        except (aiormq.exceptions.ChannelNotFoundEntity, aiormq.exceptions.ChannelPreconditionFailed, MQServeError):
            raise
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and really_cancelled():
                raise
            refusal = broker_refusal(error)
            raise BrokerUnavailable(refusal or f"RabbitMQ did not answer ({words_of(error)}): {self._link!r}") from error


def _arguments(max_length: int | None) -> dict[str, Any]:
    limit = {} if max_length is None else {"x-max-length": max_length}
    return {**_CLASSIC, "x-max-priority": 4, "x-overflow": "reject-publish", **limit}


def _foreign(error: Exception) -> MQServeError:
    return MQServeError(
        f"RabbitMQ has an exchange or a queue under a name of ours that is not as we make it ({words_of(error)}): "
        "empty what is in it, delete it, and it is made again"
    )
