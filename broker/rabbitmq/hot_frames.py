"""Our own AMQP protocol for the hot frames, beneath aiormq.

Nearly all frames of a busy connection are deliveries and returns with their content, confirms, publishes and acks. aiormq awaits a stream
reader three times for each frame, decodes it generically, and passes it through a queue and two tasks; it writes through another queue and
task. That was a quarter of a request's cost in the replica and the largest part of it in the proxy. Here the hot frames are parsed by
struct as the bytes arrive and handed to their channel at once, and what a channel sends goes straight to the transport. Every other frame
reaches aiormq unchanged and in order, so aiormq still logs in, opens, consumes, closes and sends heartbeats.

Nothing private of aiormq is used: `HotTransport` is a transport factory for its connection.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable
from typing import Any, Protocol

from aiormq.connection import TransportFactory
from aiormq.exceptions import AMQPConnectionError
from pamqp import frame
from pamqp.commands import Basic
from pamqp.exceptions import PAMQPException
from yarl import URL

from .unreadable import read_header

logger = logging.getLogger(__name__)

_METHOD, _HEADER, _BODY, _HEARTBEAT = 1, 2, 3, 8  # types of frames
_KINDS = frozenset((_METHOD, _HEADER, _BODY, _HEARTBEAT))
_END = 0xCE
_HEARTBEAT_FRAME = b"\x08\x00\x00\x00\x00\x00\x00\xce"
_AROUND = 8  # bytes of a frame beside its payload: type, channel, length before it, and the end mark after it
_LIFE_SIGN_EVERY_S = 1.0
_TLS_GOODBYE_S = 2.0  # a frozen broker does not answer the closing of a TLS connection


def _method(class_id: int, method_id: int) -> int:
    return class_id << 16 | method_id


_DELIVER, _RETURN = _method(60, 60), _method(60, 50)
_ACK, _NACK = _method(60, 80), _method(60, 120)
_CONFIRMS = frozenset((_ACK, _NACK))
_CHANNEL_ENDS = frozenset((_method(20, 40), _method(20, 41)))  # channel.close, channel.close-ok
_ALARMS = {_method(10, 60): True, _method(10, 61): False}  # connection.blocked, connection.unblocked

_read_start = struct.Struct(">BHI").unpack_from  # type, channel, length of the payload
_read_method = struct.Struct(">I").unpack_from
_read_tag = struct.Struct(">QB").unpack_from  # delivery tag, bits
_read_body_size = struct.Struct(">Q").unpack_from
_pack_start = struct.Struct(">BHI").pack
_pack_header_start = struct.Struct(">BHIHHQ").pack  # … class, weight, size of the body
_pack_settling = struct.Struct(">BHIIQBB").pack  # … method, delivery tag, bits, end mark


class BrokenStream(Exception):
    """The bytes are no AMQP, or not what a broker may send. The connection cannot go on, since the next frame's place is unknown."""


class HotChannel(Protocol):
    """What a channel is told about its hot frames, while the bytes arrive."""

    wants_address: bool  # whether `on_address` is called

    def on_address(self, exchange: str, routing_key: str) -> None:
        """Where the next delivery was published. It costs every message some time, and only the leading controller asks for it."""
        ...

    def on_delivery(self, tag: int, redelivered: bool, properties: Basic.Properties, body: bytes) -> None: ...

    def on_return(self, returned: Basic.Return, properties: Basic.Properties) -> None: ...

    def on_confirm(self, tag: int, *, multiple: bool, refused: bool) -> None: ...

    def on_writable(self) -> None:
        """The transport takes bytes again, after `is_paused`."""
        ...


class _Content:
    """A delivery or a return whose header or body has not arrived completely."""

    __slots__ = ("missing", "parts", "properties", "redelivered", "returned", "tag")

    def __init__(self, tag: int, redelivered: bool, returned: Basic.Return | None) -> None:
        self.tag = tag
        self.redelivered = redelivered
        self.returned = returned
        self.properties: Basic.Properties | None = None
        self.missing = 0  # bytes of the body
        self.parts: list[bytes] = []


class FrameReader:
    """Divides a connection's bytes: hot frames of the channels in `channels` go to these, all other frames to `pass_on`, whole.

    A channel is in `channels` from its registration until the broker closes it or confirms its end; from then on the number may be
    another channel's.
    """

    def __init__(self, pass_on: Callable[[bytes], None]) -> None:
        self.channels: dict[int, HotChannel] = {}
        self.is_blocked = False  # RabbitMQ has an alarm, and reads nothing from a connection that publishes
        self._pass_on = pass_on
        self._contents: dict[int, _Content] = {}  # by channel
        self._rest: list[bytes] = []  # the beginning of a frame
        self._missing = 0  # bytes until there is something to do about `_rest`

    def feed(self, data: bytes) -> None:
        """Raises BrokenStream; then nothing more may be fed."""
        if self._rest:
            self._rest.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            data = b"".join(self._rest)
            self._rest.clear()
        done = passed = 0  # all bytes before `done` are whole frames; those from `passed` on are still to be passed on
        end = _AROUND  # of the next frame, as far as it is known
        size = len(data)
        try:
            while end <= size:
                kind, number, length = _read_start(data, done)
                if kind not in _KINDS or (length == 0) != (kind == _HEARTBEAT):
                    raise BrokenStream(f"no frame begins with {data[done : done + 7]!r}")
                end = done + _AROUND + length
                if end > size:
                    break
                if data[end - 1] != _END:
                    raise BrokenStream(f"a frame of {length} bytes ends with {data[end - 1]:#x}")
                if self._take(kind, number, data, done + 7, end - 1):
                    if passed < done:
                        self._pass_on(data[passed:done])
                    passed = end
                done = end
                end += _AROUND
        except BrokenStream:
            self._pass_on(data[passed:])  # aiormq's error says more while it logs in, such as of another protocol version
            raise
        if passed < done:
            self._pass_on(data[passed:done])
        if done < size:
            self._rest.append(data[done:] if done else data)
            self._missing = end - size

    def _take(self, kind: int, number: int, data: bytes, begin: int, end: int) -> bool:
        """Whether the frame, whose payload is `data[begin:end]`, is a hot one."""
        if kind == _METHOD:
            if end - begin < 4:
                raise BrokenStream("a method frame names no method")
            return self._take_method(number, data, begin, end)
        channel = self.channels.get(number)
        if channel is None:
            return False
        content = self._contents.get(number)
        if content is None or kind == _HEARTBEAT:
            return False  # such as the content of a basic.get
        if kind == _HEADER:
            if content.properties is not None:
                raise BrokenStream("a content has two headers")
            if end - begin < 12:
                raise BrokenStream("a content header is too short")
            content.missing = _read_body_size(data, begin + 4)[0]
            content.properties = read_header(data[begin:end]).properties
        else:
            if content.properties is None:
                raise BrokenStream("a body comes without a header")
            content.parts.append(data[begin:end])
            content.missing -= end - begin
        if content.missing <= 0:
            self._hand_over(channel, number, content)
        return True

    def _take_method(self, number: int, data: bytes, begin: int, end: int) -> bool:
        (method,) = _read_method(data, begin)
        channel = self.channels.get(number)
        if channel is None:
            if number == 0 and method in _ALARMS:
                self.is_blocked = _ALARMS[method]
            return False
        if method in _CHANNEL_ENDS:
            del self.channels[number]
            self._contents.pop(number, None)
            return False
        if number in self._contents:
            raise BrokenStream("another method comes before the end of a content")
        if method == _DELIVER:
            at = begin + 5 + data[begin + 4]  # behind the consumer tag
            if at + 9 > end:
                raise BrokenStream("a basic.deliver is too short")
            tag, bits = _read_tag(data, at)
            self._contents[number] = _Content(tag, bool(bits & 1), None)
            if channel.wants_address:
                channel.on_address(*_read_address(data, at + 9, end))
            return True
        if method in _CONFIRMS:
            if begin + 13 > end:
                raise BrokenStream("a confirm is too short")
            tag, bits = _read_tag(data, begin + 4)
            channel.on_confirm(tag, multiple=bool(bits & 1), refused=method == _NACK)
            return True
        if method == _RETURN:
            self._contents[number] = _Content(0, False, _read_return(data[begin - 7 : end + 1]))
            return True
        return False

    def _hand_over(self, channel: HotChannel, number: int, content: _Content) -> None:
        del self._contents[number]
        assert content.properties is not None
        if content.returned is not None:
            return channel.on_return(content.returned, content.properties)
        body = content.parts[0] if len(content.parts) == 1 else b"".join(content.parts)
        channel.on_delivery(content.tag, content.redelivered, content.properties, body)


def _read_address(data: bytes, at: int, end: int) -> tuple[str, str]:
    """Reads the exchange and the routing key of a delivery. Bytes that are no UTF-8 become characters that no name has."""
    key_at = at + 1 + data[at] if at < end else end
    key_end = key_at + 1 + data[key_at] if key_at < end else end + 1
    if key_end > end:
        raise BrokenStream("a basic.deliver is too short")
    return data[at + 1 : key_at].decode(errors="replace"), data[key_at + 1 : key_end].decode(errors="replace")


def _read_return(whole_frame: bytes) -> Basic.Return:
    try:
        returned = frame.unmarshal(whole_frame)[2]
    except PAMQPException as error:
        raise BrokenStream(f"a basic.return cannot be read: {error}") from error
    assert isinstance(returned, Basic.Return)
    return returned


class HotProtocol(asyncio.StreamReaderProtocol):
    """The protocol of one connection: aiormq's stream reader gets the frames that are not hot, and `write` bypasses its writer."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._running_loop = asyncio.get_running_loop()
        super().__init__(reader, loop=self._running_loop)
        self.frames = FrameReader(super().data_received)
        self.is_paused = False  # the transport's buffer is full
        self._wire: Any = None  # the transport, while it is connected
        self._next_life_sign = 0.0

    def __repr__(self) -> str:
        state = "not connected" if self._wire is None else "paused" if self.is_paused else "connected"
        return f"<HotProtocol of channels {sorted(self.frames.channels)}, {state}>"

    def write(self, data: bytes) -> None:
        """Sends whole frames. On a connection that was lost this does nothing: its channels are told by aiormq."""
        if self._wire is not None and not self._wire.is_closing():
            self._wire.write(data)

    def abort(self) -> None:
        """Ends the connection at once, without sending what is buffered."""
        if self._wire is not None:
            self._wire.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._wire = transport
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wire = None
        self.frames.channels.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        try:
            self.frames.feed(data)
        except BrokenStream as error:
            logger.warning("RabbitMQ sent what is no AMQP (%s); ending the connection", error)
            return self.abort()
        except Exception:
            logger.exception("a hot frame was not handled; ending the connection, so that RabbitMQ delivers again what was lost")
            return self.abort()
        if self.frames.channels and self._running_loop.time() >= self._next_life_sign:
            # A broker that sends other frames sends no heartbeats, and aiormq, which sees none of ours, would take it for dead.
            self._next_life_sign = self._running_loop.time() + _LIFE_SIGN_EVERY_S
            super().data_received(_HEARTBEAT_FRAME)

    def pause_writing(self) -> None:
        self.is_paused = True
        super().pause_writing()

    def resume_writing(self) -> None:
        self.is_paused = False
        super().resume_writing()
        for channel in list(self.frames.channels.values()):
            channel.on_writable()


class HotTransport(TransportFactory):
    """The transport factory of one connection: TCP or TLS, as the URL says, with `protocol` on it."""

    def __init__(self) -> None:
        self._reader = asyncio.StreamReader(loop=asyncio.get_running_loop())
        self.protocol = HotProtocol(self._reader)

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        provider = kwargs.pop("ssl_context_provider")
        kwargs |= {"host": url.host, "port": url.port}
        if url.scheme == "amqps":
            kwargs |= {"ssl": await provider.get_context(), "ssl_shutdown_timeout": _TLS_GOODBYE_S}
        loop = asyncio.get_running_loop()
        try:
            transport, _ = await loop.create_connection(lambda: self.protocol, **kwargs)
        except OSError as error:
            raise AMQPConnectionError(*error.args) from error
        return self._reader, asyncio.StreamWriter(transport, self.protocol, self._reader, loop)


def pack_publish(method_frame: bytes, number: int, properties: bytes, body: bytes, step: int) -> bytes:
    """Packs a message as one group of frames: the method frame, the content header, and the body in frames of at most `step` bytes."""
    parts: list[bytes | memoryview] = [
        method_frame,
        _pack_header_start(_HEADER, number, 12 + len(properties), 60, 0, len(body)),
        properties,
        b"\xce",
    ]
    view = memoryview(body)
    for start in range(0, len(body), step):
        piece = view[start : start + step]
        parts += (_pack_start(_BODY, number, len(piece)), piece, b"\xce")
    return b"".join(parts)


def pack_ack(number: int, tag: int, *, multiple: bool) -> bytes:
    return _pack_settling(_METHOD, number, 13, _ACK, tag, multiple, _END)


def pack_requeue(number: int, tag: int) -> bytes:
    return _pack_settling(_METHOD, number, 13, _NACK, tag, 2, _END)
