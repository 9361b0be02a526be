"""Dead letters on RabbitMQ: taken one by one, unacked, on a channel of their own. When the channel ends, for any reason, RabbitMQ
requeues the letters that were not acked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import aiormq
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic, Queue

from ..dead_letters import DeadLetter
from ..errors import BrokerUnavailable, UnknownBackend, words_of
from .connection import OPERATION_BUDGET_S, Link, really_cancelled
from .refusals import broker_refusal

_FIRST_BUDGET_S = 5.0  # another consumer may hold all letters
_FAILURES = (aiormq.exceptions.AMQPError, aiormq.exceptions.ChannelInvalidStateError, OSError, TimeoutError)


@asynccontextmanager
async def open_dead_letters(link: Link, queue: str, backend: str, at_most: int | None) -> AsyncIterator[RabbitDeadLetters]:
    try:
        channel = await (await link.up()).open_channel(confirms=False)
        try:
            letters = RabbitDeadLetters(channel, queue, backend, at_most)
            await letters.begin()
            yield letters
            await letters.look()  # acks have no reply; RabbitMQ answers this only after it has processed them
        finally:
            with suppress(Exception, asyncio.CancelledError):
                await channel.close(timeout=OPERATION_BUDGET_S)
    except aiormq.exceptions.ChannelNotFoundEntity:
        raise UnknownBackend(f"there is no backend {backend!r}, and there are no dead letters of one") from None
    except (*_FAILURES, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and really_cancelled():
            raise
        raise BrokerUnavailable(
            broker_refusal(error)
            or f"RabbitMQ did not answer ({words_of(error)}): what was to be removed may still be among the dead letters of "
            f"{backend!r}, look again"
        ) from error


class RabbitDeadLetters:
    """Implements `DeadLetters`; made by `open_dead_letters`.

    A consumer holds the oldest letter, the others are fetched (`basic.get`). RabbitMQ counts a queue as unused and empty if it has no
    consumer and all its messages are unacked: deleting its backend would delete it together with those messages.
    """

    def __init__(self, channel: aiormq.abc.AbstractChannel, queue: str, backend: str, at_most: int | None) -> None:
        self._channel = channel
        self._queue = queue
        self._backend = backend
        self._at_most = at_most
        self._consumed: asyncio.Queue[DeliveredMessage] = asyncio.Queue()
        self._tags: dict[int, int] = {}  # id() of a letter -> delivery tag
        self.waiting = 0
        self.is_read_elsewhere = False

    def __repr__(self) -> str:
        return f"<RabbitDeadLetters of {self._queue}, {self.waiting} at the beginning>"

    async def begin(self) -> None:
        found = await self.look()
        self.waiting, self.is_read_elsewhere = found.message_count or 0, bool(found.consumer_count)
        await self._channel.basic_qos(prefetch_count=1, timeout=OPERATION_BUDGET_S)
        await self._channel.basic_consume(self._queue, self._consumed.put, timeout=OPERATION_BUDGET_S)

    async def look(self) -> Queue.DeclareOk:
        return await self._channel.queue_declare(self._queue, passive=True, timeout=OPERATION_BUDGET_S)

    async def __aiter__(self) -> AsyncIterator[DeadLetter]:
        if not self.waiting:
            return
        first: DeliveredMessage | None = None
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_BUDGET_S):
                first = await self._consumed.get()
        for _ in range(1, self.waiting if self._at_most is None else min(self._at_most, self.waiting)):
            message = await self._channel.basic_get(self._queue, timeout=OPERATION_BUDGET_S)
            if isinstance(message.delivery, Basic.GetEmpty):
                break
            yield self._letter(message)
        if first is not None:
            yield self._letter(first)  # yielded last: once it is removed, the consumer takes another

    async def remove(self, letter: DeadLetter) -> None:
        async with asyncio.timeout(OPERATION_BUDGET_S):
            await self._channel.basic_ack(self._tags.pop(id(letter)))

    def _letter(self, message: DeliveredMessage) -> DeadLetter:
        letter = DeadLetter.from_amqp(self._backend, message.header.properties, message.body)
        self._tags[id(letter)] = message.delivery_tag or 0
        return letter
