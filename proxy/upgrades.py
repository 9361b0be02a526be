"""What an `Upgrade` header asks for: WebSockets get another protocol on their connection, all other offers are passed over."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request
from websockets.protocol import State

from ..broker.sessions import CloseCode

Pairs = list[tuple[bytes, bytes]]

logger = logging.getLogger(__name__)
_quiet = logging.getLogger(f"{__name__}.frames")  # uvicorn logs each handshake, and websockets each frame
_quiet.setLevel(logging.WARNING)

# What the handshake itself needs; the app gets all headers.
_OF_THE_HANDSHAKE = frozenset((b"host", b"origin", b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-protocol"))


def without_upgrade(parser: httptools.HttpRequestParser, url: bytes, headers: Pairs, *, chunked: bool) -> bytes:
    """Returns the head of a request without the offer to change protocols."""
    lines = [b"%b %b HTTP/%b\r\n" % (parser.get_method(), url, parser.get_http_version().encode())]
    lines += [b"%b: %b\r\n" % pair for pair in headers]
    if chunked:
        lines.append(b"transfer-encoding: chunked\r\n")
    if not parser.should_keep_alive():
        lines.append(b"connection: close\r\n")
    return b"".join([*lines, b"\r\n"])


def is_handshake(parser: httptools.HttpRequestParser) -> bool:
    """Whether a request that offers WebSockets is a handshake. Any other is answered as if it had not offered them."""
    return bool(parser.get_method() == b"GET" and parser.get_http_version() == "1.1")


def has_body(headers: Pairs) -> bool:
    return any(name == b"content-length" and value.strip(b"0") for name, value in headers)


def _is_utf8(parts: list[bytes]) -> bool:
    try:
        b"".join(parts).decode()
    except UnicodeDecodeError:
        return False
    return True


_TAKES_A_CLOSE_S = 2.0  # the time that a client has to take the close while the proxy ends


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """The connection of one session. The edge has read and checked the head of the handshake, and hands it on by `begin`."""

    def __init__(self, edge: Any) -> None:
        super().__init__(edge.config, edge.server_state, edge.app_state)
        self.logger = self.conn.logger = _quiet
        self.conn.debug = False
        self._ending: asyncio.TimerHandle | None = None
        self._is_broken = False  # the client sends what is no WebSocket, too much, or too early

    def begin(self, transport: asyncio.Transport, url: bytes, headers: Pairs, scheme: str, client: tuple[str, int] | None) -> None:
        """Takes over the connection. All else is what the edge has read of the handshake, for the app's scope."""
        target = httptools.parse_url(url)
        self._read = {
            "scheme": "wss" if scheme in ("https", "wss") else "ws",
            "client": client,
            "path": unquote(target.path.decode("ascii")),
            "raw_path": target.path,
            "query_string": target.query or b"",
            "headers": headers,
        }
        self.connection_made(transport)
        transport.set_protocol(self)
        needed = [b"%b: %b\r\n" % (name, value) for name, value in headers if name in _OF_THE_HANDSHAKE]
        super().data_received(b"".join([b"GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n", *needed, b"\r\n"]))

    def handle_connect(self, event: Request) -> None:
        """Begins the session, with the scope that the edge has made."""
        super().handle_connect(event)
        if self.handshake_complete:  # refused
            return
        scope = cast(dict[str, Any], self.scope)
        scope |= self._read

    def data_received(self, data: bytes) -> None:
        if self._is_broken:
            return
        if self.handshake_complete:
            return super().data_received(data)
        # Nobody reads that yet, so nobody would notice behind it that the client leaves.
        self._is_broken = self.handshake_complete = True
        self.conn.send_response(self.conn.reject(400, "nothing may follow a WebSocket handshake before its answer\n"))
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.transport.close()

    def send_receive_event_to_app(self) -> None:
        """Refuses text that is no UTF-8 before uvicorn fails on it, which it does where a close has come behind it."""
        if self.curr_msg_data_type == "text" and not _is_utf8(self.frames):
            self.frames = []
            if self.conn.state is State.OPEN:
                self.conn.fail(CloseCode.NO_TEXT, "a text message is UTF-8")
                self.handle_parser_exception()
            return
        super().send_receive_event_to_app()

    async def send(self, message: Any) -> None:
        await self.writable.wait()
        if self._is_broken:  # uvicorn would take this for an app that sends after its own close
            raise ClientDisconnected
        await super().send(message)

    def handle_ping(self) -> None:
        if not self._is_broken:  # by a message before it
            super().handle_ping()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.conn.close_rcvd is None:  # a client that has gone without a close
            self.queue.put_nowait({"type": "websocket.disconnect", "code": CloseCode.ABNORMAL, "reason": ""})
        super().connection_lost(exc)
        if self._ending is not None:
            self._ending.cancel()

    def eof_received(self) -> None:
        """The client has closed its side: there is nobody to take what is still to be written."""
        self.transport.abort()

    def handle_parser_exception(self) -> None:
        """Says why, and discards what still comes: closed at once, the kernel would reset the connection, and the client not read it."""
        if self.conn.close_sent is None:  # before the handshake was answered
            return self.transport.close()
        self._is_broken = self.close_sent = True
        self.stop_keepalive()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": self.conn.close_sent.code, "reason": self.conn.close_sent.reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        if self.read_paused:
            self.transport.resume_reading()
        self.close_timer = self.loop.call_later(self.close_timeout, self.transport.abort)

    def shutdown(self) -> None:
        """The proxy ends, and the session was told so. A client that does not even take that is not waited for."""
        if self.handshake_complete:
            super().shutdown()
            self._end_within(_TAKES_A_CLOSE_S)

    def _end_within(self, seconds: float) -> None:
        """A transport that was closed waits for ever for a client that takes nothing."""
        if self._ending is not None:
            self._ending.cancel()
        self._ending = None if self.disconnected else self.loop.call_later(seconds, self.transport.abort)

    async def run_asgi(self) -> None:
        try:
            await self.app(self.scope, self.receive, self.send)
        except ClientDisconnected:
            pass
        except Exception:
            logger.exception(
                "a WebSocket session ended in a bug in mqserve or in a middleware: please report it if it is not the middleware's"
            )
            self.send_500_response()
        finally:
            if self.close_timer is None:
                self.transport.close()
            self._end_within(self.close_timeout + 1)

    def keepalive_timeout(self) -> None:
        """No pong has come. While the app is slow nothing is read from the client, so none can."""
        if not self.read_paused:
            super().keepalive_timeout()
            return self.transport.abort() if self.transport.get_write_buffer_size() else None
        self.pong_timer = self.pending_ping_payload = None
        self.schedule_ping()
