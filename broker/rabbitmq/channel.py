"""A channel whose writes of one loop turn go out as one, and whose confirms are tracked rather than awaited.

aiormq opens and closes the channel; its hot frames come from and go to the transport directly (`hot_frames.py`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from aiormq.abc import ChannelFrame
from aiormq.channel import Channel
from pamqp.commands import Basic
from pamqp.frame import marshal

from ..errors import BrokerUnavailable, MQServeError, NotRouted, Overloaded
from ..queue import Settled
from .connection import close_channel
from .hot_frames import HotProtocol, pack_ack, pack_publish, pack_requeue
from .refusals import broker_refusal

_FULL_QUEUE_RETRY_S = 0.001
_CLOSE_BUDGET_S = 1.0
_WRITE_BYTES = 128 * 1024  # more is several writes, each only while the transport takes bytes
_KEPT_FRAMES = 256
_Message = tuple[str, str, str]  # exchange, routing key, message id
_NO_MESSAGE: _Message = ("", "", "")


class JoinedChannel:
    """Owns one channel that aiormq opened, until it is closed or its connection ends."""

    def __init__(
        self,
        channel: Channel,
        hot: HotProtocol,
        on_delivery: Callable[[int, bool, Basic.Properties, bytes], None] | None = None,
        *,
        wants_address: bool = False,
        told_once_closed: str = "the channel to RabbitMQ is closed",
    ) -> None:
        self._channel = channel
        self._hot = hot
        self._on_delivery = on_delivery
        self.wants_address = wants_address
        self.address = ("", "")  # exchange and routing key of the latest delivery, if they are wanted
        self._loop = asyncio.get_running_loop()
        self._out: deque[bytes] = deque()  # each one a whole group of frames
        self._flushing = False
        # Publishing: our tag -> (the message, whom to tell); a return names no tag, so the message is told by where it was sent
        self._next_tag = 1
        self._unconfirmed: dict[int, tuple[_Message, Settled]] = {}
        self._confirmed_at = 0.0  # the last confirm, or the first publish since all were confirmed; in the loop's time
        self._returned: list[_Message] = []
        self._publish_frames: dict[tuple[str, str], bytes] = {}  # by exchange and routing key
        self._step = channel.max_content_size if channel.max_content_size > 0 else 2**31  # a broker may set no limit
        # Consuming: the broker's tags in order of delivery, and those whose ack is due
        self._held: dict[int, None] = {}
        self._finished: set[int] = set()
        self._has_ended = False  # we closed it
        self._closed_at = 0.0  # in the loop's time
        self._told_once_closed = told_once_closed  # to those who publish then
        self._refusal = ""  # why the broker closed it, where that was a right we lack
        self._closed = channel.closing
        self._closed.add_done_callback(self._on_closed)
        hot.frames.channels[channel.number] = self

    def __repr__(self) -> str:
        return f"<JoinedChannel {self._channel.number}, {len(self._unconfirmed)} unconfirmed, {len(self._held)} held>"

    @property
    def is_open(self) -> bool:
        return not self._channel.is_closed

    @property
    def closed_s(self) -> float:
        """For how long it has been closed; 0 while it is open, and for the few loop turns until aiormq has told this of the end."""
        return self._loop.time() - self._closed_at if self._closed_at else 0.0

    @property
    def is_refused(self) -> bool:
        """Whether it was closed for a right that was lacking."""
        return bool(self._refusal)

    @property
    def held(self) -> int:
        """Deliveries neither acked nor requeued."""
        return len(self._held)

    @property
    def stalled_s(self) -> float:
        """For how long the broker has confirmed nothing although something waits for it."""
        return self._loop.time() - self._confirmed_at if self._unconfirmed else 0.0

    def give_up(self) -> None:
        """Tells whoever waits for a confirm that none will come."""
        self._fail_unconfirmed()

    async def wait_closed(self) -> None:
        await asyncio.wait([self._closed])

    async def close(self) -> None:
        """Sends what is due, although the transport may be full, and closes the channel. Deliveries that still arrive are dropped, since
        RabbitMQ delivers them again."""
        self._on_delivery = None
        while self._is_on_the_wire and (self._out or self._finished):
            await self._channel.write_queue.put(ChannelFrame(payload=self._next_write(), should_close=False))
        self._has_ended = True
        await close_channel(self._channel, _CLOSE_BUDGET_S)

    def publish(self, exchange: str, routing_key: str, properties: bytes, body: bytes, message_id: str, settled: Settled) -> None:
        """Joins this turn's write; `properties` is the packed flags and list of the content header."""
        if not self.is_open:
            return settled(BrokerUnavailable(self._refusal or self._told_once_closed))
        if not self._unconfirmed:
            self._confirmed_at = self._loop.time()
        self._unconfirmed[self._next_tag] = ((exchange, routing_key, message_id), settled)
        self._next_tag += 1
        method = self._publish_frames.get((exchange, routing_key)) or self._publish_frame(exchange, routing_key)
        self._out.append(pack_publish(method, self._channel.number, properties, body, self._step))
        self._flush_soon()

    def _publish_frame(self, exchange: str, routing_key: str) -> bytes:
        """The method frame is the same for every message to one queue of a backend; replies to strangers' queues are not kept."""
        method = Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=bool(exchange))
        frame = marshal(method, self._channel.number)
        if exchange:
            if len(self._publish_frames) >= _KEPT_FRAMES:  # backends come and go
                self._publish_frames.clear()
            self._publish_frames[exchange, routing_key] = frame
        return frame

    def ack(self, tag: int) -> None:
        if tag in self._held:
            self._finished.add(tag)
            self._flush_soon()

    def requeue(self, tag: int) -> None:
        if self._held.pop(tag, tag) is None:
            self._out.append(pack_requeue(self._channel.number, tag))
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Writes what is due, in whole groups of frames: to the transport, or behind what aiormq has not written yet. While the transport
        is full, `on_writable` calls this again."""
        self._flushing = False
        if not self._is_on_the_wire:
            return self._out.clear()
        queue = self._channel.write_queue
        while (self._out or self._finished) and not self._hot.is_paused:
            if queue.full():
                self._flushing = True
                self._loop.call_later(_FULL_QUEUE_RETRY_S, self._flush)
                return
            payload = self._next_write()
            if queue.empty():
                self._hot.write(payload)
            else:
                queue.put_nowait(ChannelFrame(payload=payload, should_close=False))

    @property
    def _is_on_the_wire(self) -> bool:
        """Whether frames of this channel may be sent: RabbitMQ ends a connection that sends one on a closed channel. aiormq counts it
        as open until that is confirmed."""
        return not self._has_ended and self.is_open and self._hot.frames.channels.get(self._channel.number) is self

    def _next_write(self) -> bytes:
        size, groups = 0, []
        while self._out and size < _WRITE_BYTES:
            groups.append(self._out.popleft())
            size += len(groups[-1])
        if self._finished and not self._out:
            groups += self._acks()
        return groups[0] if len(groups) == 1 else b"".join(groups)

    def _acks(self) -> list[bytes]:
        """The finished head of the line as one ack of many, each later one by itself: never past an unfinished tag."""
        last = 0
        for tag in self._held:
            if tag not in self._finished:
                break
            last = tag
        due = [(last, True)] if last else []
        due += [(tag, False) for tag in sorted(self._finished) if tag > last]
        for tag in self._finished:
            del self._held[tag]
        self._finished.clear()
        return [pack_ack(self._channel.number, tag, multiple=many) for tag, many in due]

    def on_writable(self) -> None:
        self._flush_soon()

    def on_address(self, exchange: str, routing_key: str) -> None:
        self.address = exchange, routing_key

    def on_delivery(self, tag: int, redelivered: bool, properties: Basic.Properties, body: bytes) -> None:
        if self._on_delivery is not None:
            self._held[tag] = None
            self._on_delivery(tag, redelivered, properties, body)

    def on_return(self, returned: Basic.Return, properties: Basic.Properties) -> None:
        message = (returned.exchange or "", returned.routing_key or "", properties.message_id or "")
        self._returned.append(message)  # its confirm follows, and settles it

    def on_confirm(self, tag: int, *, multiple: bool, refused: bool) -> None:
        self._confirmed_at = self._loop.time()
        if not multiple:
            return self._settle(tag, refused)
        tags = []
        for waiting in self._unconfirmed:
            if waiting > tag:
                break
            tags.append(waiting)
        for confirmed in tags:
            self._settle(confirmed, refused)

    def _settle(self, tag: int, refused: bool) -> None:
        message, settled = self._unconfirmed.pop(tag, (_NO_MESSAGE, _nobody))
        error: MQServeError | None = None
        if refused:
            error = Overloaded("the backend's queue is full (max_queued_requests): try again later")
        elif self._returned and message in self._returned:
            self._returned.remove(message)
            error = NotRouted("no queue is bound to that backend: is it deployed?")
        settled(error)

    def _on_closed(self, closed: asyncio.Future[Any]) -> None:
        self._closed_at = self._loop.time()  # before anybody is told: for how long it has been away decides whether they try again
        if not closed.cancelled():
            self._refusal = broker_refusal(closed.exception())
        self._fail_unconfirmed()

    def _fail_unconfirmed(self) -> None:
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        why = self._refusal or "the connection to RabbitMQ was lost before it confirmed the message"
        for _, settled in unconfirmed.values():
            settled(BrokerUnavailable(why, maybe_sent=True))


def _nobody(error: MQServeError | None) -> None:
    pass
