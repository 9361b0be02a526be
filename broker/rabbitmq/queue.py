"""The queue on RabbitMQ, 3.10 to 4.x: two connections, reconnects of our own, topology that only the controller declares.

Two connections, since a memory alarm makes the broker stop reading a publishing one, and acks on it would stall too.
Plain connections rather than aio-pika's robust ones: there, one queue that cannot be restored keeps every other
consumer of the process down, and all processes come back in the same second. Here each consumer restores itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import aiormq
from aio_pika.abc import AbstractConnection

from .. import queue_names
from ..backoff import delays
from ..dead_letters import DeadLetter, Death, dead_letter_to_amqp
from ..envelope import Envelope
from ..errors import BrokerUnavailable, words_of
from ..queue import Delivery, Settled, fate_of
from ..values.header_seals import HeaderSeals
from .channel import JoinedChannel
from .connection import CONNECT_BUDGET_S, LONGEST_PAUSE_S, OPERATION_BUDGET_S, Link, has_alarm, open_channel, really_cancelled, user_of
from .consumer import RabbitConsumption, RabbitDelivery
from .dead_letters import RabbitDeadLetters, open_dead_letters
from .topology import RabbitTopology

logger = logging.getLogger(__name__)

STALLED_AFTER_S = 3.0  # without a confirm, though something waits for one
_SECOND_LOOK_S = 0.1
_PROBE_EVERY_S = 1.0
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
    budget_s: float = CONNECT_BUDGET_S,
) -> AsyncIterator[RabbitQueue]:
    """Connected and able to publish on entry, or BrokerUnavailable within `budget_s` + OPERATION_BUDGET_S; closed on exit.
    Without `seals` it seals nothing and checks no seal.

    With `may_be_away`, for members that serve as soon as they can, it goes on without after that time, and is connected once RabbitMQ
    is there. They wait at first all the same: one that takes another's place must not refuse what that one would have taken. With
    `sends_only`, of a proxy, it is down as long as it may not send requests.
    """
    queue = RabbitQueue(url, namespace, process_id, seals or HeaderSeals((), namespace), sends_only=sends_only)
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

    def __init__(self, url: str, namespace: str, process_id: str, seals: HeaderSeals, *, sends_only: bool = False) -> None:
        self._sends_only = sends_only
        self._namespace = namespace
        self._seals = seals
        self._requests = queue_names.requests_exchange(namespace)
        self._user = user_of(url)
        self._publishing = Link(url, f"mqserve {namespace} {process_id} publishing")
        self._consuming = Link(url, f"mqserve {namespace} {process_id} consuming")
        self._topology = RabbitTopology(self._publishing, namespace)
        self._consumptions: list[RabbitConsumption] = []
        self._channel: JoinedChannel | None = None
        self._down_since = time.monotonic()
        self.why_down = ""
        self._has_alarm = False  # when it was last found to take no messages
        self._opened = asyncio.Event()
        self._has_exchange = False  # something was published to it, and no probe has found it missing since
        self._opener: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<RabbitQueue {self._publishing!r}, {self._channel!r}>"

    def start(self) -> None:
        """From now on a publishing channel is kept open."""
        self._opener = asyncio.create_task(self._keep_channel(), name="keep the publishing channel open")

    @property
    def down_s(self) -> float:
        if self._channel is not None and self._channel.is_open:
            return 0.0
        return time.monotonic() - self._down_since

    @property
    def trouble(self) -> str:
        return "" if not self.down_s else _ALARM if self._has_alarm else "it takes no messages"

    def publish(self, backend: str, envelope: Envelope, settled: Settled) -> None:
        properties = envelope.to_amqp(self._user, self._seals.of(backend))
        self._publish(self._requests, backend, properties, envelope.body, envelope.id, settled)
        self._has_exchange = True

    def reply(self, envelope: Envelope, reply_to: str, settled: Settled) -> None:
        self._publish("", reply_to, envelope.to_amqp(self._user), envelope.body, envelope.id, settled)

    def dead_letter(self, backend: str, delivery: Delivery, death: Death, settled: Settled) -> None:
        assert isinstance(delivery, RabbitDelivery)
        packed = dead_letter_to_amqp(backend, delivery.properties, death)
        message_id = delivery.properties.message_id or ""
        self._publish(queue_names.dead_exchange(self._namespace), backend, packed, delivery.body, message_id, settled)

    def dead_letters(self, backend: str, at_most: int | None = None) -> AbstractAsyncContextManager[RabbitDeadLetters]:
        return open_dead_letters(self._consuming, queue_names.dead_queue(self._namespace, backend), backend, at_most)

    def republish(self, letter: DeadLetter, settled: Settled) -> None:
        self._publish(self._requests, letter.backend, letter.to_amqp(self._user), letter.body, letter.id, settled)

    def _publish(self, exchange: str, key: str, properties: bytes, body: bytes, message_id: str, settled: Settled) -> None:
        if self._channel is None:
            return settled(BrokerUnavailable(f"no connection to RabbitMQ ({self._publishing!r})", public=_ALARM if self._has_alarm else ""))
        self._channel.publish(exchange, key, properties, body, message_id, settled)

    async def consume(self, backend: str, generation: int, prefetch: int, on_delivery: Callable[[Delivery], None]) -> RabbitConsumption:
        queue = queue_names.backend_queue(self._namespace, backend, generation)
        consumption = RabbitConsumption(self._consuming, queue, prefetch, on_delivery, self._seals.of(backend))
        consumption.start()
        try:
            await consumption.started()
        except BaseException:
            await consumption.close()  # or it would come to consume one day, unknown to anybody
            raise
        self._consumptions = [kept for kept in self._consumptions if not kept.cancelled] + [consumption]
        return consumption

    async def declare(self, backend: str, generation: int, max_length: int | None) -> None:
        await self._topology.declare(backend, generation, max_length)

    async def unbind(self, backend: str, generation: int) -> None:
        await self._topology.unbind(backend, generation)

    async def depth(self, backend: str, generation: int) -> int | None:
        return await self._topology.depth(backend, generation)

    async def count_dead(self, backend: str) -> int | None:
        return await self._topology.count_dead(backend)

    async def delete(self, backend: str, generation: int, *, only_if_empty: bool) -> bool:
        return await self._topology.delete(backend, generation, only_if_empty=only_if_empty)

    async def _ready_to_publish(self) -> None:
        try:
            async with asyncio.timeout(OPERATION_BUDGET_S):
                await self._opened.wait()
        except TimeoutError:
            raise BrokerUnavailable(f"RabbitMQ opened no channel within {OPERATION_BUDGET_S:g} s: {self._publishing!r}") from None

    async def close(self) -> None:
        for consumption in self._consumptions:
            await consumption.close()
        if self._opener is not None:
            self._opener.cancel()
            await asyncio.gather(self._opener, return_exceptions=True)
        if self._channel is not None:
            self._channel.give_up()  # whoever waits for a confirm: none will be heard
        await asyncio.gather(self._publishing.close(), self._consuming.close())

    async def _keep_channel(self) -> None:
        pauses = delays(cap_s=LONGEST_PAUSE_S)
        while True:
            try:
                connection = await self._publishing.up()
            except BrokerUnavailable as error:  # after a wait, so no pause is due: what is back is to be used at once
                self.why_down = words_of(error)
                logger.warning("cannot publish (%s); trying again", self.why_down)
                continue
            try:
                raw = await open_channel(connection, confirms=True)
                channel = JoinedChannel(raw)
                await self._probe(raw, channel)
                await self._probe(raw, channel)  # with an alarm, the broker still reads the first message of a connection
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
                    self._has_alarm = has_alarm(connection)
                    self._publishing.abandon(connection)
            await asyncio.sleep(next(pauses))

    async def _watch(self, connection: AbstractConnection, raw: aiormq.channel.Channel, channel: JoinedChannel) -> None:
        """Until the channel is lost, or the broker confirms nothing any more (it hangs, or has an alarm): then whoever waits for a confirm
        is told, and nobody else has to wait in vain."""
        closed = asyncio.create_task(channel.wait_closed())
        try:
            while True:
                await asyncio.wait([closed], timeout=_PROBE_EVERY_S)
                if closed.done():
                    self._down_since = time.monotonic()
                    return
                await self._probe(raw, channel)
        except TimeoutError:
            self._channel = None
            self._down_since = time.monotonic() - STALLED_AFTER_S
            self._has_alarm = has_alarm(connection)
            self._publishing.abandon(connection)
            channel.give_up()
            why = f": {_ALARM}" if self._has_alarm else ""
            raise BrokerUnavailable(f"RabbitMQ has confirmed nothing for {STALLED_AFTER_S:g} s{why}") from None
        except BrokerUnavailable:  # the channel was lost under the probe
            self._down_since = time.monotonic()
            raise
        finally:
            closed.cancel()

    async def _probe(self, raw: aiormq.channel.Channel, channel: JoinedChannel) -> None:
        """Raises TimeoutError for a broker that does not take messages. An alarm shows only where something is published: to nobody, and
        over an exchange that is sure to exist, since a missing one closes the channel."""
        if channel.stalled_s:
            if channel.stalled_s > STALLED_AFTER_S:
                await asyncio.sleep(_SECOND_LOOK_S)
                if channel.stalled_s > STALLED_AFTER_S:
                    raise TimeoutError
            return
        if not self._has_exchange:
            await _in_time(raw.basic_qos(prefetch_count=0))
            return
        publish = partial(channel.publish, self._requests, "", _PROBE, b"", "")
        if isinstance(error := await _in_time(fate_of(publish, OPERATION_BUDGET_S)), BrokerUnavailable):
            self._has_exchange = self._sends_only and channel.is_refused  # a right that is lacking may be given back
            raise error


async def _in_time(asking: Coroutine[Any, Any, T]) -> T:
    """The broker's answer. Raises TimeoutError, unless it was this process that stood still: what came in meanwhile is read first."""
    asked = asyncio.ensure_future(asking)
    try:
        for budget_s in (STALLED_AFTER_S, _SECOND_LOOK_S):
            if (await asyncio.wait([asked], timeout=budget_s))[0]:
                return asked.result()
        raise TimeoutError
    finally:
        asked.cancel()
