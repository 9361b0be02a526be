"""An aiormq channel whose writes of one loop turn go out as one, and whose confirms are tracked rather than awaited.

aiormq writes each message and each ack by itself and makes a task for each delivery, which costs more than all the rest
of a request. This class keeps aiormq's connection, reader and flow, and takes over three of the channel's handlers, one
item on the write queue per turn, and the count of delivery tags. Those are private names: aiormq is pinned, and
`tests/broker/test_channel.py` fails when one of them moves.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any

from aiormq.abc import ChannelFrame
from aiormq.channel import Channel
from pamqp import commands
from pamqp.frame import marshal

from ..errors import BrokerUnavailable, MQServeError, NotRouted, Overloaded
from ..queue import Settled
from .refusals import broker_refusal

_FRAME_END = b"\xce"
_FULL_QUEUE_RETRY_S = 0.001
_KEPT_FRAMES = 100
_Message = tuple[str, str, str]  # exchange, routing key, message id
_NO_MESSAGE: _Message = ("", "", "")


class JoinedChannel:
    """Owns the hot path of one channel; whoever opened the channel closes it."""

    def __init__(self, channel: Channel, on_delivery: Callable[[commands.Basic.Deliver, Any, bytes], None] | None = None) -> None:
        self._channel = channel
        self._on_delivery = on_delivery
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._flushing = False
        # Publishing: our tag -> (the message, whom to tell); a return names no tag, so the message is told by where it was sent
        self._next_tag = 1
        self._unconfirmed: dict[int, tuple[_Message, Settled]] = {}
        self._confirmed_at = 0.0  # the last confirm, or the first publish since all were confirmed; in the loop's time
        self._returned: list[_Message] = []
        self._publish_frames: dict[tuple[str, str], bytes] = {}  # by exchange and routing key
        # Consuming: the broker's tags in order of delivery, and those whose ack is due
        self._held: dict[int, None] = {}
        self._finished: set[int] = set()
        channel._on_confirm_frame = self._on_confirm  # type: ignore[method-assign,assignment]
        channel._on_return_frame = self._on_return  # type: ignore[method-assign]
        channel._on_deliver_frame = self._on_deliver  # type: ignore[method-assign]
        self._refusal = ""  # why the broker closed it, where that was a right we lack
        self._closed = channel.closing
        self._closed.add_done_callback(self._fail_unconfirmed)

    def __repr__(self) -> str:
        return f"<JoinedChannel {self._channel.number}, {len(self._unconfirmed)} unconfirmed, {len(self._held)} held>"

    @property
    def is_open(self) -> bool:
        return not self._channel.is_closed

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
        self._fail_unconfirmed(self._closed)

    async def wait_closed(self) -> None:
        await asyncio.wait([self._closed])

    def publish(self, exchange: str, routing_key: str, properties: bytes, body: bytes, message_id: str, settled: Settled) -> None:
        """Joins this turn's write; `properties` is the packed flags and list of the content header."""
        if not self.is_open:
            return settled(BrokerUnavailable(self._refusal or "the channel to RabbitMQ is closed"))
        if not self._unconfirmed:
            self._confirmed_at = self._loop.time()
        self._unconfirmed[self._next_tag] = ((exchange, routing_key, message_id), settled)
        self._next_tag += 1
        number = self._channel.number
        self._out.append(self._publish_frames.get((exchange, routing_key)) or self._publish_frame(exchange, routing_key))
        self._out.append(_frame(2, number, struct.pack(">HHQ", 60, 0, len(body)) + properties))
        step = self._channel.max_content_size
        for start in range(0, len(body), step):
            self._out.append(_frame(3, number, body[start : start + step]))
        self._flush_soon()

    def _publish_frame(self, exchange: str, routing_key: str) -> bytes:
        """The method frame is the same for every message to one backend; replies to strangers' queues are not kept."""
        method = commands.Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=bool(exchange))
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
            self._out.append(marshal(commands.Basic.Nack(delivery_tag=tag, requeue=True), self._channel.number))
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if not self.is_open:
            self._out.clear()
            return
        if self._channel.write_queue.full():
            self._loop.call_later(_FULL_QUEUE_RETRY_S, self._flush)
            return
        self._flushing = False
        if self._finished:
            self._out.extend(self._acks())
        payload = b"".join(self._out)
        self._out.clear()
        self._channel.write_queue.put_nowait(ChannelFrame(payload=payload, should_close=False))

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
        return [marshal(commands.Basic.Ack(delivery_tag=tag, multiple=many), self._channel.number) for tag, many in due]

    async def _on_deliver(self, frame: commands.Basic.Deliver) -> None:
        header = await self._channel._Channel__get_content_header()  # type: ignore[attr-defined]
        message = await self._channel._read_content(frame, header)
        if self._on_delivery is not None and frame.delivery_tag is not None:
            self._held[frame.delivery_tag] = None
            self._on_delivery(frame, header.properties, message.body)

    async def _on_return(self, frame: commands.Basic.Return) -> None:
        header = await self._channel._Channel__get_content_header()  # type: ignore[attr-defined]
        await self._channel._read_content(frame, header)
        message = (frame.exchange or "", frame.routing_key or "", header.properties.message_id or "")
        self._returned.append(message)  # its confirm follows, and settles it

    async def _on_confirm(self, frame: commands.Basic.Ack | commands.Basic.Nack) -> None:
        refused = isinstance(frame, commands.Basic.Nack)
        self._confirmed_at = self._loop.time()
        tag = frame.delivery_tag or 0
        tags = [tag]
        if frame.multiple:
            tags = []
            for waiting in self._unconfirmed:
                if waiting > tag:
                    break
                tags.append(waiting)
        for confirmed in tags:
            message, settled = self._unconfirmed.pop(confirmed, (_NO_MESSAGE, _nobody))
            error: MQServeError | None = None
            if refused:
                error = Overloaded("the backend's queue is full (max_queued_requests): try again later")
            elif self._returned and message in self._returned:
                self._returned.remove(message)
                error = NotRouted("no queue is bound to that backend: is it deployed?")
            settled(error)

    def _fail_unconfirmed(self, closed: asyncio.Future[Any]) -> None:
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        if closed.done() and not closed.cancelled():
            self._refusal = broker_refusal(closed.exception())
        why = self._refusal or "the connection to RabbitMQ was lost before it confirmed the message"
        for _, settled in unconfirmed.values():
            settled(BrokerUnavailable(why, maybe_sent=True))


def _nobody(error: MQServeError | None) -> None:
    pass


def _frame(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + _FRAME_END
