"""The queue on RabbitMQ, 3.10 to 4.x: two connections, reconnects of our own, topology that only the controller declares.

Two connections, since a memory alarm makes the broker stop reading a publishing one, and acks on it would stall too.
Plain connections rather than aio-pika's robust ones: there, one queue that cannot be restored keeps every other
consumer of the process down, and all processes come back in the same second. Here each consumer restores itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import aio_pika
import aiormq
from aio_pika.abc import AbstractChannel, AbstractConnection
from pamqp.commands import Basic
from pamqp.header import ContentHeader
from yarl import URL

from . import queue_names
from .backoff import delays
from .envelope import Envelope
from .errors import BrokerUnavailable, MQServeError, QueueMismatch
from .joined_channel import JoinedChannel
from .queue import Delivery, Settled

logger = logging.getLogger(__name__)

CONNECT_BUDGET_S = 5.0
OPERATION_BUDGET_S = 5.0
HEARTBEAT_S = 10
T = TypeVar("T")


def masked(url: str) -> str:
    """The URL as it may be shown: without its password."""
    parsed = URL(url)
    return str(parsed.with_password("***")) if parsed.password else str(parsed)


@asynccontextmanager
async def open_rabbitmq(url: str, namespace: str, process_id: str) -> AsyncIterator[RabbitQueue]:
    """Connected and able to publish on entry, or BrokerUnavailable within CONNECT_BUDGET_S + OPERATION_BUDGET_S; closed on exit."""
    queue = RabbitQueue(url, namespace, process_id)
    try:
        await queue._publishing.up(CONNECT_BUDGET_S)
        await queue._ready_to_publish()
        yield queue
    finally:
        await queue.close()


class _Link:
    """One connection, kept up. Whoever needs it awaits `up`; nobody dials but `_keep`."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = name
        self._up = asyncio.Event()
        self._last_error: BaseException | None = None
        self.connection: AbstractConnection | None = None
        self._keeper: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<link {self._name} to {masked(self._url)}, {'up' if self.is_up else 'down'}>"

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    async def up(self, budget_s: float = OPERATION_BUDGET_S) -> AbstractConnection:
        """The open connection; dials on first use. Raises BrokerUnavailable after `budget_s`."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name=f"keep {self._name} connected")
        try:
            async with asyncio.timeout(budget_s):
                await self._up.wait()
        except TimeoutError:
            reason = f": {self._last_error}" if self._last_error else ""
            raise BrokerUnavailable(
                f"no connection to RabbitMQ at {masked(self._url)} within {budget_s:g} s{reason}; is it running, "
                "and is MQSERVE_BROKER_URL right?"
            ) from self._last_error
        assert self.connection is not None
        return self.connection

    async def _keep(self) -> None:
        pauses = delays()
        while True:
            try:
                async with asyncio.timeout(CONNECT_BUDGET_S):
                    self.connection = await aio_pika.connect(
                        self._url, heartbeat=HEARTBEAT_S, client_properties={"connection_name": self._name}
                    )
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and _really_cancelled():
                    raise
                self._last_error = error
                await asyncio.sleep(next(pauses))
                continue
            closed = asyncio.Event()
            self.connection.close_callbacks.add(lambda *_, closed=closed: closed.set())
            pauses = delays()
            self._last_error = None
            self._up.set()
            await closed.wait()
            self._up.clear()
            logger.warning("lost the connection to RabbitMQ at %s (%s); reconnecting", masked(self._url), self._name)
            await asyncio.sleep(next(pauses))

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self.connection is not None:
            with suppress(Exception, asyncio.CancelledError):
                async with asyncio.timeout(2):
                    await self.connection.close()


def _really_cancelled() -> bool:
    """aiormq reports a stuck connection by a bare CancelledError; only our own cancellation counts as one."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class RabbitDelivery:
    """Implements `Delivery`."""

    __slots__ = ("_channel", "_tag", "body", "properties", "redelivered")

    def __init__(self, channel: JoinedChannel, frame: Basic.Deliver, properties: Basic.Properties, body: bytes) -> None:
        self._channel = channel
        self._tag = frame.delivery_tag or 0
        self.redelivered = bool(frame.redelivered)
        self.properties = properties
        self.body = body

    def envelope(self) -> Envelope:
        return Envelope.from_amqp(self.properties, self.body)

    def ack(self) -> None:
        self._channel.ack(self._tag)

    def requeue(self) -> None:
        self._channel.requeue(self._tag)


class RabbitConsumption:
    """Implements `Consumption`: one consumer, which comes back by itself after any loss, alone."""

    def __init__(self, link: _Link, queue: str, prefetch: int, on_delivery: Callable[[Delivery], None]) -> None:
        self._link = link
        self._queue = queue
        self._prefetch = prefetch
        self._on_delivery = on_delivery
        self._consuming = asyncio.Event()
        self._changed = asyncio.Event()
        self._cancelled = False
        self._channel: JoinedChannel | None = None
        self._task = asyncio.create_task(self._keep(), name=f"consume {queue}")

    def __repr__(self) -> str:
        return f"<RabbitConsumption of {self._queue}, prefetch {self._prefetch}, {self._channel}>"

    async def started(self) -> None:
        try:
            async with asyncio.timeout(OPERATION_BUDGET_S):
                await self._consuming.wait()
        except TimeoutError:
            raise BrokerUnavailable(f"RabbitMQ did not let us consume {self._queue} within {OPERATION_BUDGET_S:g} s") from None

    def set_prefetch(self, prefetch: int) -> None:
        if prefetch != self._prefetch:
            self._prefetch = prefetch
            self._changed.set()

    async def cancel(self) -> None:
        self._cancelled = True
        self._changed.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(OPERATION_BUDGET_S):
                while self._consuming.is_set():
                    await asyncio.sleep(0.005)

    async def close(self) -> None:
        self._cancelled = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self) -> None:
        pauses = delays()
        while not self._cancelled:
            try:
                connection = await self._link.up()
                await self._consume(connection)
                pauses = delays()
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and _really_cancelled():
                    raise
                logger.warning("cannot consume %s (%s); trying again", self._queue, error or type(error).__name__)
            finally:
                self._consuming.clear()
            if not self._cancelled:
                await asyncio.sleep(next(pauses))

    async def _consume(self, connection: AbstractConnection) -> None:
        """Until the channel is lost, or, once cancelled, until every delivery in hand is settled."""
        raw = await _open_channel(connection, confirms=False)
        channel = self._channel = JoinedChannel(raw, self._hand_over)
        lost = asyncio.Event()
        raw.on_consumer_cancel_callbacks.add(lambda _: lost.set())
        closing = asyncio.create_task(channel.wait_closed())
        closing.add_done_callback(lambda _: lost.set())
        consumer_tag = ""
        try:
            while not self._cancelled and not lost.is_set():
                self._changed.clear()
                # A live qos change does not reach a running consumer: start a second one, then cancel the first.
                async with asyncio.timeout(OPERATION_BUDGET_S):
                    await raw.basic_qos(prefetch_count=self._prefetch)
                    started = await raw.basic_consume(self._queue, _unused_callback)
                    if consumer_tag:
                        await raw.basic_cancel(consumer_tag)
                consumer_tag = started.consumer_tag or ""
                self._consuming.set()
                await _first_of(self._changed, lost)
            if self._cancelled and not lost.is_set():
                async with asyncio.timeout(OPERATION_BUDGET_S):
                    await raw.basic_cancel(consumer_tag)
                self._consuming.clear()
                while channel.held and not lost.is_set():
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0)  # the last acks leave with this turn
        finally:
            closing.cancel()
            with suppress(Exception, asyncio.CancelledError):
                async with asyncio.timeout(1):
                    await raw.close()

    def _hand_over(self, frame: Basic.Deliver, properties: Basic.Properties, body: bytes) -> None:
        assert self._channel is not None
        delivery = RabbitDelivery(self._channel, frame, properties, body)
        if self._cancelled:
            delivery.requeue()
        else:
            self._on_delivery(delivery)


class RabbitQueue:
    """Implements `Queue`; made by `open_rabbitmq`."""

    def __init__(self, url: str, namespace: str, process_id: str) -> None:
        self._namespace = namespace
        self._requests = queue_names.requests_exchange(namespace)
        self._publishing = _Link(url, f"mqserve {namespace} {process_id} publishing")
        self._consuming = _Link(url, f"mqserve {namespace} {process_id} consuming")
        self._consumptions: list[RabbitConsumption] = []
        self._channel: JoinedChannel | None = None
        self._opened = asyncio.Event()
        self._opener: asyncio.Task[None] = asyncio.create_task(self._keep_channel(), name="keep the publishing channel open")

    def __repr__(self) -> str:
        return f"<RabbitQueue {self._publishing!r}, {self._channel!r}>"

    @property
    def connected(self) -> bool:
        return self._channel is not None and self._channel.is_open

    def publish(self, backend: str, envelope: Envelope, settled: Settled) -> None:
        self._publish(self._requests, backend, envelope.to_amqp(), envelope.body, envelope.id, settled)

    def reply(self, envelope: Envelope, reply_to: str, settled: Settled) -> None:
        self._publish("", reply_to, envelope.to_amqp(), envelope.body, envelope.id, settled)

    def dead_letter(self, backend: str, delivery: Delivery, reason: str, settled: Settled) -> None:
        assert isinstance(delivery, RabbitDelivery)
        properties = delivery.properties
        headers = {**(properties.headers or {}), "mq-reason": reason[:2000], "mq-backend": backend, "mq-died-at": int(time.time() * 1000)}
        packed = _pack(properties, headers)
        self._publish(queue_names.dead_exchange(self._namespace), backend, packed, delivery.body, properties.message_id or "", settled)

    def _publish(self, exchange: str, key: str, properties: bytes, body: bytes, message_id: str, settled: Settled) -> None:
        if self._channel is None:
            return settled(BrokerUnavailable(f"no connection to RabbitMQ ({self._publishing!r})"))
        self._channel.publish(exchange, key, properties, body, message_id, settled)

    async def consume(self, backend: str, generation: int, prefetch: int, on_delivery: Callable[[Delivery], None]) -> RabbitConsumption:
        queue = queue_names.backend_queue(self._namespace, backend, generation)
        consumption = RabbitConsumption(self._consuming, queue, prefetch, on_delivery)
        try:
            await consumption.started()
        except BaseException:
            await consumption.close()  # or it would come to consume one day, unknown to anybody
            raise
        self._consumptions.append(consumption)
        return consumption

    async def declare(self, backend: str, generation: int, max_length: int | None) -> None:
        arguments: dict[str, Any] = {"x-max-priority": 4, "x-overflow": "reject-publish"}
        if max_length is not None:
            arguments["x-max-length"] = max_length
        dead_arguments: dict[str, Any] = {
            "x-max-length": queue_names.DEAD_LETTER_LIMIT,
            "x-message-ttl": queue_names.DEAD_LETTER_TTL_MS,
        }

        async def declare(channel: AbstractChannel) -> None:
            dead = await channel.declare_exchange(queue_names.dead_exchange(self._namespace), "direct", durable=True)
            name = queue_names.dead_queue(self._namespace, backend)
            dead_letters = await channel.declare_queue(name, durable=True, arguments=dead_arguments)
            await dead_letters.bind(dead, backend)
            requests = await channel.declare_exchange(self._requests, "direct", durable=True)
            name = queue_names.backend_queue(self._namespace, backend, generation)
            queue = await channel.declare_queue(name, durable=True, arguments=arguments)
            await queue.bind(requests, backend)

        try:
            await self._on_own_channel(declare)
        except aiormq.exceptions.ChannelPreconditionFailed as error:
            raise QueueMismatch(f"generation {generation} of the queue of {backend!r} exists with other arguments") from error

    async def unbind(self, backend: str, generation: int) -> None:
        name = queue_names.backend_queue(self._namespace, backend, generation)

        async def unbind(channel: AbstractChannel) -> None:
            queue = await channel.get_queue(name, ensure=False)
            await queue.unbind(self._requests, backend)

        with suppress(aiormq.exceptions.ChannelNotFoundEntity):
            await self._on_own_channel(unbind)

    async def depth(self, backend: str, generation: int) -> int | None:
        name = queue_names.backend_queue(self._namespace, backend, generation)

        async def depth(channel: AbstractChannel) -> int | None:
            queue = await channel.declare_queue(name, passive=True)
            return queue.declaration_result.message_count

        try:
            return await self._on_own_channel(depth)
        except aiormq.exceptions.ChannelNotFoundEntity:
            return None

    async def delete(self, backend: str, generation: int, *, only_if_empty: bool) -> bool:
        name = queue_names.backend_queue(self._namespace, backend, generation)

        async def delete(channel: AbstractChannel) -> None:
            queue = await channel.get_queue(name, ensure=False)
            await queue.delete(if_unused=only_if_empty, if_empty=only_if_empty)

        try:
            await self._on_own_channel(delete)
        except aiormq.exceptions.ChannelNotFoundEntity:
            return True
        except aiormq.exceptions.ChannelPreconditionFailed:
            return False
        if not only_if_empty:
            await self._delete_empty_dead_letters(backend)
        return True

    async def _delete_empty_dead_letters(self, backend: str) -> None:
        async def delete(channel: AbstractChannel) -> None:
            dead_letters = await channel.get_queue(queue_names.dead_queue(self._namespace, backend), ensure=False)
            await dead_letters.delete(if_unused=True, if_empty=True)

        with suppress(aiormq.exceptions.ChannelNotFoundEntity, aiormq.exceptions.ChannelPreconditionFailed):
            await self._on_own_channel(delete)

    async def _ready_to_publish(self) -> None:
        try:
            async with asyncio.timeout(OPERATION_BUDGET_S):
                await self._opened.wait()
        except TimeoutError:
            raise BrokerUnavailable(f"RabbitMQ opened no channel within {OPERATION_BUDGET_S:g} s: {self._publishing!r}") from None

    async def close(self) -> None:
        for consumption in self._consumptions:
            await consumption.close()
        self._opener.cancel()
        await asyncio.gather(self._opener, return_exceptions=True)
        await asyncio.gather(self._publishing.close(), self._consuming.close())

    async def _keep_channel(self) -> None:
        pauses = delays()
        while True:
            try:
                connection = await self._publishing.up()
                self._channel = JoinedChannel(await _open_channel(connection, confirms=True))
                self._opened.set()
                pauses = delays()
                await self._channel.wait_closed()
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and _really_cancelled():
                    raise
                logger.warning("cannot publish (%s); trying again", error or type(error).__name__)
            await asyncio.sleep(next(pauses))

    async def _on_own_channel(self, act: Callable[[AbstractChannel], Awaitable[T]]) -> T:
        """Topology goes over a channel of its own, since whatever fails closes it. One error for all of RabbitMQ's silences."""
        try:
            connection = await self._publishing.up()
            async with asyncio.timeout(OPERATION_BUDGET_S):
                channel = connection.channel()
                try:
                    await channel.initialize()
                    return await act(channel)
                finally:
                    with suppress(Exception):
                        await channel.close()
        except (aiormq.exceptions.ChannelNotFoundEntity, aiormq.exceptions.ChannelPreconditionFailed, MQServeError):
            raise
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _really_cancelled():
                raise
            raise BrokerUnavailable(f"RabbitMQ did not answer ({error or type(error).__name__}): {self._publishing!r}") from error


async def _open_channel(connection: AbstractConnection, *, confirms: bool) -> aiormq.channel.Channel:
    async with asyncio.timeout(OPERATION_BUDGET_S):
        channel = await connection.transport.connection.channel(publisher_confirms=confirms, frame_buffer_size=256)  # type: ignore[union-attr]
    assert isinstance(channel, aiormq.channel.Channel)
    return channel


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def _unused_callback(message: object) -> None:
    """aiormq wants one; `JoinedChannel` takes every delivery before it gets here."""


def _pack(properties: Basic.Properties, headers: dict[str, Any]) -> bytes:
    """A stranger's properties with our headers, as flags and list; without its headers if they cannot be written again."""
    properties.headers = headers
    properties.expiration = None  # a dead letter outlives the request
    properties.delivery_mode = 2
    try:
        return ContentHeader(0, 0, properties).marshal()[12:]
    except Exception:
        properties.headers = {key: value for key, value in headers.items() if key.startswith("mq-")}
        return ContentHeader(0, 0, properties).marshal()[12:]
