"""The queue on RabbitMQ, 3.10 to 4.x: two connections, our own reconnects, and a topology that only the controller declares.

There are two connections because a memory alarm makes the broker stop reading a publishing one: acks on it would stall too. They are
plain connections and not aio-pika's robust ones: there, one queue that cannot be restored keeps every other consumer of the process down,
and all processes reconnect in the same second. Here each consumer restores itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TypeVar

import aiormq

from .. import queue_names
from ..backoff import delays
from ..dead_letters import DeadLetter, Death, dead_letter_to_amqp
from ..envelope import Envelope, persistent
from ..errors import BrokerUnavailable, words_of
from ..later import addressed
from ..process.ticks import next_tick_s
from ..queue import Consumption, Delivery, Settled, fate_of
from ..shards import shares
from ..values.header_seals import HeaderSeals
from .channel import JoinedChannel
from .connection import (
    CONNECT_BUDGET_S,
    LONGEST_PAUSE_S,
    MEND,
    NO_ANSWER,
    OPERATION_BUDGET_S,
    Link,
    RabbitConnection,
    answer_of,
    really_cancelled,
    user_of,
)
from .consumer import AddressedDelivery, RabbitConsumption, RabbitDelivery, RabbitJobDelivery, ShardedConsumption, one_started
from .dead_letters import RabbitDeadLetters, open_dead_letters
from .later import RabbitLater
from .topology import RabbitTopology
from .webhooks import RabbitWebhooks

logger = logging.getLogger(__name__)

STALLED_AFTER_S = 3.0  # no confirm for this long, while a publish waits for one
_SECOND_LOOK_S = 0.1
PROBE_EVERY_S = 1.0  # in proxies and clients, which must know within five seconds that RabbitMQ takes no messages
PROBE_SELDOM_EVERY_S = 5.0  # in replicas and controllers, which seldom publish and do not look first whether RabbitMQ takes it
_LOOK_EVERY_S = 1.0
_ALARM = "it has an alarm, of its memory or its disk"
_PROBE = Envelope("", b"", "text/plain").to_amqp()
T = TypeVar("T")


@asynccontextmanager
async def open_rabbitmq(
    url: str,
    namespace: str,
    process_id: str,
    *,
    seals: HeaderSeals | None = None,
    may_be_away: bool = False,
    sends_only: bool = False,
    probe_every_s: float = PROBE_EVERY_S,
    budget_s: float = CONNECT_BUDGET_S,
) -> AsyncIterator[RabbitQueue]:
    """Yields a queue that is connected and able to publish, or raises BrokerUnavailable within `budget_s` + OPERATION_BUDGET_S; closes it
    on exit. Without `seals` it makes and checks no seals.

    With `may_be_away`, after that time it yields an unconnected queue instead, which connects once RabbitMQ is there. It waits first all
    the same: a member that replaces another must not refuse requests that the other would have taken. With `sends_only`, for a proxy, the
    queue counts as down while it has no right to send requests.
    """
    queue = RabbitQueue(url, namespace, process_id, seals or HeaderSeals((), namespace), sends_only=sends_only, probe_every_s=probe_every_s)
    queue.start()
    try:
        try:
            await queue._publishing.up(budget_s)
            await queue._ready_to_publish()
        except BrokerUnavailable as error:
            if not may_be_away:
                raise
            logger.warning("%s goes on without RabbitMQ until it is there: %s", process_id, error)
        yield queue
    finally:
        await queue.close()


class RabbitQueue:
    """Implements `Queue`; made by `open_rabbitmq`."""

    def __init__(
        self,
        url: str,
        namespace: str,
        process_id: str,
        seals: HeaderSeals,
        *,
        sends_only: bool = False,
        probe_every_s: float = PROBE_EVERY_S,
    ) -> None:
        self._sends_only = sends_only
        self._probe_every_s = probe_every_s
        self._namespace = namespace
        self._seals = seals
        self._requests = queue_names.requests_exchange(namespace)
        self._jobs = queue_names.jobs_exchange(namespace)
        self._user = user_of(url)
        self._publishing = Link(url, f"mqserve {namespace} {process_id} publishing")
        self._consuming = Link(url, f"mqserve {namespace} {process_id} consuming")
        self._no_connection = f"no connection to {self._publishing.server}; {MEND}"
        self._topology = RabbitTopology(self._publishing, namespace)
        self.later = RabbitLater(namespace, self._topology, seals, self._user, self._publish, self._consume_queue)
        self.webhooks = RabbitWebhooks(namespace, self._topology, self._publish, self._consume_queue, self._consuming)
        self._consumptions: list[RabbitConsumption] = []
        self._channel: JoinedChannel | None = None
        self._down_since = time.monotonic()  # while there is no channel, not even a closed one
        self.why_down = ""
        self._has_alarm = False  # whether an alarm was the cause when the broker last took no messages
        self._opened = asyncio.Event()
        self._has_exchange = False  # a publish went to the exchange, and no probe has found it missing since
        self._opener: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<RabbitQueue {self._publishing!r}, {self._channel!r}>"

    def start(self) -> None:
        """From now on a publishing channel is kept open."""
        self._opener = asyncio.create_task(self._keep_channel(), name="keep the publishing channel open")

    @property
    def broker_version(self) -> str:
        return self._publishing.broker_version

    @property
    def down_s(self) -> float:
        return time.monotonic() - self._down_since if self._channel is None else self._channel.closed_s

    @property
    def trouble(self) -> str:
        return "" if not self.down_s else _ALARM if self._has_alarm else "it takes no messages"

    def publish(self, backend: str, envelope: Envelope, settled: Settled, shard: int = 0) -> None:
        properties = envelope.to_amqp(self._user, self._seals.of(backend))
        key = queue_names.routing_key(backend, shard) if shard else backend
        self._publish(self._requests, key, properties, envelope.body, envelope.id, settled)
        self._has_exchange = True

    def publish_job(self, backend: str, envelope: Envelope, settled: Settled) -> None:
        properties = persistent(envelope).to_amqp(self._user, self._seals.of(backend))
        self._publish(self._jobs, backend, properties, envelope.body, envelope.id, settled)

    def publish_later(self, backend: str, envelope: Envelope, delay_s: float, settled: Settled) -> None:
        properties = addressed(persistent(envelope), backend).to_amqp(self._user, self._seals.of(backend))
        exchange = queue_names.later_exchange(self._namespace)
        self._publish(exchange, queue_names.DUE_KEY, properties, envelope.body, envelope.id, settled)

    def reply(self, envelope: Envelope, reply_to: str, settled: Settled) -> None:
        self._publish("", reply_to, envelope.to_amqp(self._user), envelope.body, envelope.id, settled)

    def dead_letter(self, backend: str, delivery: Delivery, death: Death, settled: Settled) -> None:
        assert isinstance(delivery, RabbitDelivery)
        packed = dead_letter_to_amqp(backend, delivery.properties, death, is_job=delivery.is_job)
        message_id = delivery.properties.message_id or ""
        self._publish(queue_names.dead_exchange(self._namespace), backend, packed, delivery.body, message_id, settled)

    def dead_letters(self, backend: str, at_most: int | None = None) -> AbstractAsyncContextManager[RabbitDeadLetters]:
        return open_dead_letters(self._consuming, queue_names.dead_queue(self._namespace, backend), backend, at_most)

    def republish(self, letter: DeadLetter, settled: Settled) -> None:
        exchange, key = self._jobs if letter.is_job else self._requests, letter.backend
        if letter.endpoint:
            exchange, key = queue_names.endpoints_exchange(self._namespace), letter.endpoint
        self._publish(exchange, key, letter.to_amqp(self._user), letter.body, letter.id, settled)

    def _publish(self, exchange: str, key: str, properties: bytes, body: bytes, message_id: str, settled: Settled) -> None:
        if self._channel is None:
            return settled(BrokerUnavailable(self._no_connection, public=_ALARM if self._has_alarm else ""))
        self._channel.publish(exchange, key, properties, body, message_id, settled)

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
        queues = [queue_names.backend_queue(self._namespace, backend, generation, shard) for shard in range(shards)]
        delivery = RabbitDelivery
        if jobs:
            queues, delivery = [queue_names.jobs_queue(self._namespace, backend, generation)], RabbitJobDelivery
        consumptions = [
            RabbitConsumption(self._consuming, queue, share, on_delivery, self._seals.of(backend), delivery)
            for queue, share in zip(queues, shares(prefetch, len(queues)), strict=True)
        ]
        await self._start(consumptions)
        return consumptions[0] if len(consumptions) == 1 else ShardedConsumption(consumptions)

    async def _consume_queue(self, queue: str, prefetch: int, on_delivery: Callable[[RabbitDelivery], None]) -> Consumption:
        """Consumes a queue that is no backend's. Each delivery is an AddressedDelivery."""
        consumption = RabbitConsumption(self._consuming, queue, prefetch, on_delivery, None, AddressedDelivery)
        await self._start([consumption])
        return consumption

    async def _start(self, consumptions: list[RabbitConsumption]) -> None:
        for consumption in consumptions:
            consumption.start()
        try:
            await one_started(consumptions)
        except BaseException:
            for consumption in consumptions:
                await consumption.close()  # otherwise it could start to consume later, without an owner
            raise
        self._consumptions = [kept for kept in self._consumptions if not kept.cancelled] + consumptions

    async def declare(self, backend: str, generation: int, max_length: int | None, shards: int = 1) -> None:
        await self._topology.declare(backend, generation, max_length, shards)

    async def count_shards(self, backend: str, generation: int, known: int = 0) -> int:
        return await self._topology.count_shards(backend, generation, known)

    async def unbind(self, backend: str, generation: int, shards: int = 1) -> None:
        await self._topology.unbind(backend, generation, shards)

    async def depth(self, backend: str, generation: int, shards: int = 1) -> int | None:
        return await self._topology.depth(backend, generation, shards)

    async def count_jobs(self, backend: str, generation: int) -> int | None:
        return await self._topology.count_jobs(backend, generation)

    async def count_dead(self, backend: str) -> int | None:
        return await self._topology.count_dead(backend)

    async def delete(self, backend: str, generation: int, shards: int = 1, *, only_if_empty: bool) -> bool:
        return await self._topology.delete(backend, generation, shards, only_if_empty=only_if_empty)

    async def _ready_to_publish(self) -> None:
        try:
            async with asyncio.timeout(OPERATION_BUDGET_S):
                await self._opened.wait()
        except TimeoutError:
            raise BrokerUnavailable(f"{self._publishing.server} opened no channel within {OPERATION_BUDGET_S:g} s; {MEND}") from None

    async def close(self) -> None:
        for consumption in self._consumptions:
            await consumption.close()
        if self._opener is not None:
            self._opener.cancel()
            await asyncio.gather(self._opener, return_exceptions=True)
        if self._channel is not None:
            self._channel.give_up()  # fails the publishes that wait for a confirm
        await asyncio.gather(self._publishing.close(), self._consuming.close())

    async def _keep_channel(self) -> None:
        pauses = delays(cap_s=LONGEST_PAUSE_S)
        while True:
            try:
                connection = await self._publishing.up()
            except BrokerUnavailable as error:  # `up` has waited already, so retry without a delay
                self.why_down = words_of(error)
                logger.warning("cannot publish (%s); trying again", self.why_down)
                continue
            try:
                raw = await connection.open_channel(confirms=True)
                channel = JoinedChannel(raw, connection.hot, told_once_closed=self._no_connection)
                await self._probe(raw, channel)
                await self._probe(raw, channel)  # twice: with an alarm, the broker still reads the first message of a connection
                self._channel, self.why_down, self._has_alarm = channel, "", False
                self._opened.set()
                pauses = delays(cap_s=LONGEST_PAUSE_S)
                await self._watch(connection, raw, channel)
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and really_cancelled():
                    raise
                self.why_down = words_of(error)
                logger.warning("cannot publish (%s); trying again", self.why_down)
                if isinstance(error, TimeoutError):
                    self._has_alarm = connection.has_alarm
                    self._publishing.abandon(connection, _ALARM if self._has_alarm else NO_ANSWER)
            await asyncio.sleep(next(pauses))

    async def _watch(self, connection: RabbitConnection, raw: aiormq.channel.Channel, channel: JoinedChannel) -> None:
        """Returns when the channel is lost. If the broker confirms nothing any more (it hangs, or has an alarm), it fails the publishes
        that wait for a confirm, and raises BrokerUnavailable."""
        closed = asyncio.create_task(channel.wait_closed())
        try:
            probed_at = time.monotonic()
            while True:
                await asyncio.wait([closed], timeout=next_tick_s(_LOOK_EVERY_S))
                if closed.done():
                    return
                if channel.stalled_s or time.monotonic() - probed_at > self._probe_every_s - _LOOK_EVERY_S / 2:
                    await self._probe(raw, channel)
                    probed_at = time.monotonic()
        except TimeoutError:
            self._channel = None
            self._down_since = time.monotonic() - STALLED_AFTER_S
            self._has_alarm = connection.has_alarm
            why = f"RabbitMQ has confirmed nothing for {STALLED_AFTER_S:g} s{f': {_ALARM}' if self._has_alarm else ''}"
            self._publishing.abandon(connection, why)
            channel.give_up()
            raise BrokerUnavailable(why) from None
        finally:
            closed.cancel()

    async def _probe(self, raw: aiormq.channel.Channel, channel: JoinedChannel) -> None:
        """Raises TimeoutError if the broker does not take messages. An alarm shows only when something is published, so this publishes a
        message with no route, over an exchange that is known to exist, since a missing one would close the channel."""
        if channel.stalled_s:
            if channel.stalled_s > STALLED_AFTER_S:
                await asyncio.sleep(_SECOND_LOOK_S)
                if channel.stalled_s > STALLED_AFTER_S:
                    raise TimeoutError
            return
        if not self._has_exchange:
            await _in_time(answer_of(raw.basic_qos(prefetch_count=0)))
            return
        publish = partial(channel.publish, self._requests, "", _PROBE, b"", "")
        if isinstance(error := await _in_time(fate_of(publish, OPERATION_BUDGET_S)), BrokerUnavailable):
            self._has_exchange = self._sends_only and channel.is_refused  # a missing right may be given back, so keep probing for it
            raise error


async def _in_time(asking: Awaitable[T]) -> T:
    """Returns the broker's answer. Raises TimeoutError if there is none; looks twice, since this process itself may have been frozen,
    with the answer waiting in its socket."""
    asked = asyncio.ensure_future(asking)
    try:
        for budget_s in (STALLED_AFTER_S, _SECOND_LOOK_S):
            if (await asyncio.wait([asked], timeout=budget_s))[0]:
                return asked.result()
        raise TimeoutError
    finally:
        asked.cancel()
