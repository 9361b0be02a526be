"""Consuming from RabbitMQ: deliveries, and a consumer that restores itself, independently of others, after any loss."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from aiormq.channel import Channel
from pamqp.commands import Basic

from ..backoff import delays
from ..envelope import Envelope
from ..errors import BrokerUnavailable, words_of
from ..process.stopping import first_of
from ..shards import shares
from ..values.header_seals import BackendSeals
from .channel import JoinedChannel
from .connection import LONGEST_PAUSE_S, NO_ANSWER, OPERATION_BUDGET_S, Link, RabbitConnection, answer_of, really_cancelled
from .refusals import broker_refusal

logger = logging.getLogger(__name__)

ASK_EVERY_S = 5.0  # how often an idle consumer checks that the broker still answers


class RabbitDelivery:
    """Implements `Delivery`."""

    __slots__ = ("_channel", "_seals", "_tag", "body", "properties", "redelivered")
    is_job = False  # whether it came from the queue for jobs
    has_address = False  # whether it says where it was published

    def __init__(
        self, channel: JoinedChannel, tag: int, redelivered: bool, properties: Basic.Properties, body: bytes, seals: BackendSeals | None
    ) -> None:
        self._channel = channel
        self._seals = seals
        self._tag = tag
        self.redelivered = redelivered
        self.properties = properties
        self.body = body

    @property
    def is_lost(self) -> bool:
        """Whether its channel has ended, so that RabbitMQ delivers it again."""
        return not self._channel.is_open

    @property
    def wants_events(self) -> bool:
        return (self.properties.headers or {}).get("mq-events") is True

    def envelope(self) -> Envelope:
        return Envelope.from_amqp(self.properties, self.body, self._seals)

    def ack(self) -> None:
        self._channel.ack(self._tag)

    def requeue(self) -> None:
        self._channel.requeue(self._tag)


class RabbitJobDelivery(RabbitDelivery):
    """A delivery from the queue for jobs."""

    __slots__ = ()
    is_job = True


class AddressedDelivery(RabbitDelivery):
    """A delivery that says where it was published."""

    __slots__ = ("exchange", "routing_key")
    has_address = True

    def __init__(
        self, channel: JoinedChannel, tag: int, redelivered: bool, properties: Basic.Properties, body: bytes, seals: BackendSeals | None
    ) -> None:
        super().__init__(channel, tag, redelivered, properties, body, seals)
        self.exchange, self.routing_key = channel.address


class RabbitConsumption:
    """Implements `Consumption`: one consumer, which restores itself after any loss, independently of others."""

    def __init__(
        self,
        link: Link,
        queue: str,
        prefetch: int,
        on_delivery: Callable[[RabbitDelivery], None],
        seals: BackendSeals | None,
        delivery: type[RabbitDelivery] = RabbitDelivery,
    ) -> None:
        self._link = link
        self._delivery = delivery
        self._seals = seals
        self._queue = queue
        self._prefetch = prefetch
        self._on_delivery = on_delivery
        self._consuming = asyncio.Event()
        self._changed = asyncio.Event()
        self._may_deliver = False  # the broker was asked to, and has not confirmed that it stopped
        self.cancelled = False
        self._refusal = ""
        self._channel: JoinedChannel | None = None
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<RabbitConsumption of {self._queue}, prefetch {self._prefetch}, {self._channel}>"

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep(), name=f"consume {self._queue}")

    async def started(self) -> None:
        """Raises BrokerUnavailable where nothing is delivered in our time."""
        try:
            async with asyncio.timeout(OPERATION_BUDGET_S):
                await self._consuming.wait()
        except TimeoutError:
            why = self._refusal or f"RabbitMQ did not let us consume {self._queue} within {OPERATION_BUDGET_S:g} s"
            raise BrokerUnavailable(why) from None

    def set_prefetch(self, prefetch: int) -> None:
        if prefetch != self._prefetch:
            self._prefetch = prefetch
            self._changed.set()

    async def cancel(self) -> None:
        self.cancelled = True
        self._changed.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(OPERATION_BUDGET_S):
                while self._may_deliver:
                    await asyncio.sleep(0.005)

    async def close(self) -> None:
        self.cancelled = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self) -> None:
        pauses = delays(cap_s=LONGEST_PAUSE_S)
        while not self.cancelled:
            try:
                connection = await self._link.up()
            except BrokerUnavailable as error:  # `up` has waited already, so retry without a delay
                logger.warning("cannot consume %s (%s); trying again", self._queue, error)
                continue
            try:
                await self._consume(connection)
                pauses = delays(cap_s=LONGEST_PAUSE_S)
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and really_cancelled():
                    raise
                if isinstance(error, TimeoutError):
                    self._link.abandon(connection, NO_ANSWER)
                self._refusal = broker_refusal(error)
                logger.warning("cannot consume %s (%s); trying again", self._queue, self._refusal or words_of(error))
            finally:
                self._consuming.clear()
                self._may_deliver = False
            if not self.cancelled:
                await asyncio.sleep(next(pauses))

    async def _consume(self, connection: RabbitConnection) -> None:
        """Consumes until the channel is lost or, after `cancel`, until every delivery in hand is settled."""
        raw = await connection.open_channel(confirms=False)
        channel = self._channel = JoinedChannel(raw, connection.hot, self._hand_over, wants_address=self._delivery.has_address)
        lost = asyncio.Event()
        raw.on_consumer_cancel_callbacks.add(lambda _: lost.set())
        closing = asyncio.create_task(channel.wait_closed())
        closing.add_done_callback(lambda _: lost.set())
        consumer_tag = ""
        try:
            while not self.cancelled and not lost.is_set():
                self._changed.clear()
                # A live qos change does not reach a running consumer: start a second one, then cancel the first.
                self._may_deliver = True
                async with asyncio.timeout(OPERATION_BUDGET_S):
                    await answer_of(raw.basic_qos(prefetch_count=self._prefetch))
                    started = await answer_of(raw.basic_consume(self._queue, _unused_callback))
                    if consumer_tag:
                        await answer_of(raw.basic_cancel(consumer_tag))
                consumer_tag = started.consumer_tag or ""
                self._consuming.set()
                await self._watch(connection, raw, lost)
            if self.cancelled and not lost.is_set():
                async with asyncio.timeout(OPERATION_BUDGET_S):
                    await answer_of(raw.basic_cancel(consumer_tag))
                self._may_deliver = False
                while channel.held and not lost.is_set():
                    await asyncio.sleep(0.01)
        finally:
            closing.cancel()
            with suppress(Exception, asyncio.CancelledError):
                async with asyncio.timeout(1):
                    await channel.close()

    async def _watch(self, connection: RabbitConnection, raw: Channel, lost: asyncio.Event) -> None:
        """Returns when the prefetch changes or the channel is lost. It pings the broker meanwhile: heartbeats would notice a hanging one
        only after half a minute."""
        while not self._changed.is_set() and not lost.is_set():
            if await first_of(self._changed, lost, timeout_s=ASK_EVERY_S):
                return
            try:
                async with asyncio.timeout(OPERATION_BUDGET_S):
                    await answer_of(raw.basic_qos(prefetch_count=self._prefetch))
            except TimeoutError:
                self._link.abandon(connection, NO_ANSWER)
                raise BrokerUnavailable(NO_ANSWER) from None

    def _hand_over(self, tag: int, redelivered: bool, properties: Basic.Properties, body: bytes) -> None:
        assert self._channel is not None
        self._on_delivery(self._delivery(self._channel, tag, redelivered, properties, body, self._seals))


class ShardedConsumption:
    """Implements `Consumption` for a backend with several queues: a consumer of each, and the prefetch divided among them. RabbitMQ limits
    each consumer alone: one limit for all of a channel (global QoS) is refused from 4.3 on. A queue that cannot be consumed does not keep
    the others from it: each consumer restores itself."""

    def __init__(self, consumptions: Sequence[RabbitConsumption]) -> None:
        self._consumptions = consumptions

    def __repr__(self) -> str:
        return f"<ShardedConsumption of {len(self._consumptions)} queues, {self._consumptions[0]!r} first>"

    def set_prefetch(self, prefetch: int) -> None:
        for consumption, share in zip(self._consumptions, shares(prefetch, len(self._consumptions)), strict=True):
            consumption.set_prefetch(share)

    async def cancel(self) -> None:
        await asyncio.gather(*(consumption.cancel() for consumption in self._consumptions))


async def one_started(consumptions: Sequence[RabbitConsumption]) -> None:
    """Returns once one of them consumes: the others go on trying by themselves, each its own queue. Raises BrokerUnavailable where none
    consumes in our time."""
    starts = [asyncio.create_task(consumption.started()) for consumption in consumptions]
    try:
        waiting = set(starts)
        while waiting:
            ended, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if any(start.exception() is None for start in ended):
                return
        starts[0].result()
    finally:
        for start in starts:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)


async def _unused_callback(message: object) -> None:
    """aiormq requires a callback, but no delivery reaches it (`hot_frames.py`)."""
