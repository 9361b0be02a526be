"""The strict edge: what stands between a socket and the app.

llhttp, under uvicorn, refuses most of what is malformed. Here is the rest: bounds and timeouts while a request comes in, framing
that two servers could read in two ways, and headers that concern the connection only. What is refused is told as a problem, and
the connection closed, since nobody knows where the next request would begin.
"""

from __future__ import annotations

import asyncio
import logging
import re
from asyncio import BaseTransport, Transport
from asyncio.events import TimerHandle
from functools import partial
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from ..broker.calls.sending import MAX_BODY_BYTES
from ..broker.envelope import MAX_HEAD_BYTES, mint_id
from ..broker.process.printable import printable
from .flush import Flush
from .forwarded import NAMES, PREFIX, forwarders
from .half_close import HalfClosed
from .request_line import Refused, check_protocol, not_http, origin_form
from .responses import HOP_BY_HOP, problem
from .streaming import CUT, CutShort, cut, until_the_end
from .upgrades import WebSocketProtocol, has_body, is_handshake, without_upgrade

logger = logging.getLogger(__name__)

HEAD_TIMEOUT_S = 10.0
BODY_TIMEOUT_S = 60.0
LINGER_S = 5.0  # to a client that is still sending: closed at once, the kernel would reset the connection and the answer be lost
MAX_HEADERS = 200
MAX_PIPELINED = 16  # requests that wait behind the one being answered: one read can bring thousands, each far larger here than there
MAX_LOOSE_BYTES = MAX_HEAD_BYTES + 4096  # the app, which tells the exact size, refuses first where it can

NOTHING, HEAD, BODY = range(3)  # what of a request has been begun; an Enum's members take longer to look up, five times a request

_TOO_LONG = f"the request line and headers take more than {MAX_HEAD_BYTES} bytes, the limit: send less, or send it in the body"
_OURS = b"x-mqserve-"  # inside the instance only: nobody may send them in
_WATCHED = HOP_BY_HOP | NAMES | {b"host", b"content-length", b"expect", b"last-event-id", b"prefer", b"idempotency-key", b"x-not-before"}
_HOST = re.compile(rb"[\w.~%!$&'()*+,;=:\[\]-]*", re.ASCII)
# What rights depend on (a client must not have a header removed that a server in front has set), and where the request ends.
_END_TO_END = frozenset(
    b"content-length host origin authorization cookie forwarded via x-real-ip x-forwarded-for x-forwarded-host x-forwarded-prefix "
    b"x-forwarded-proto".split()
)
_NAMES_NOTHING = (b"", b"keep-alive", b"close", b"Keep-Alive")


class EdgeProtocol(HttpToolsProtocol):
    """One connection. Its own state is about the request that is being read; `cycle` and `pipeline` are those being answered."""

    head_timeout_s = HEAD_TIMEOUT_S
    body_timeout_s = BODY_TIMEOUT_S
    linger_s = LINGER_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._phase = NOTHING
        self._advanced = False  # whether the last bytes brought a whole head, some body or an end
        self._loose_bytes = 0  # that came in since, and that the parser may have to keep
        self._due = 0.0  # loop time by which it must advance; 0 for never
        self._timer: TimerHandle | None = None  # set for `_due` or earlier, so that most requests need not touch it
        self._flush = Flush(self.loop, self.body_timeout_s)
        self._answering: RequestResponseCycle | None = None
        self._refusal = b""
        self._again = False
        self._host: bytes | None = None
        self._connection = b""
        self._chunked = False
        self._upgrade = b""
        self._left = False  # the connection, to a WebSocket
        self._read = b""  # what is being parsed; the head under way may stand in it, beside other bytes
        self._read_before: list[bytes] = []  # what came before of the head under way
        self._half_closed: HalfClosed | None = None  # set once the client has closed its side, if it is to be answered
        self._forwarders = forwarders(self.config.forwarded_allow_ips)
        self._is_forwarded = False  # whether a header says that a server in front forwarded the request
        self._prefers = self._has_to_wait = False  # whether one says that it may be a job, or has to await something before it is sent

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(cast(Transport, transport))
        self._expect_within(self.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timers()
        if self._half_closed is not None:
            self._half_closed.stop()
        if self._answering is not None and not self._answering.response_complete:  # not `cycle` where requests are pipelined
            self._give_up(self._answering)
        self.pipeline.clear()

    def _stop_timers(self) -> None:
        self._flush.stop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def data_received(self, data: bytes) -> None:
        if self._refusal:
            return
        self._read = data
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(
                cause
                if isinstance(cause, Refused)
                else not_http(error, self.url, b"".join([*self._read_before, self._read]) if self._phase is HEAD else b"")
            )
        except Refused as refused:
            self._refuse(refused)
        else:
            if not self._left:
                self._watch(len(data))
        self._read = b""  # it may be large
        if self._phase is HEAD:
            self._read_before.append(data[-MAX_LOOSE_BYTES:])
        elif self._read_before:
            self._read_before.clear()

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio lets it say so, and uvicorn never does
        """The client has closed its side. True keeps ours open, for answers to come; a request that is not complete is refused."""
        if self._refusal and self._due:
            return False  # the refusal was said, and this is the end that it lingers for
        if not self._refusal and self._phase is not NOTHING:
            what = "body" if self._phase is BODY else "head"
            self._refuse(Refused(400, f"the client closed its side before the {what} of its request was complete: send all of it first"))
        answering = self._answering
        if answering is None or answering.response_complete:
            return False
        if not self._refusal:
            self.cycle.keep_alive = False  # the last one
        self._half_close(answering)
        return True

    def _half_close(self, answering: RequestResponseCycle) -> None:
        self._half_closed = HalfClosed(self.transport, self.loop)
        self.transport = cast(Transport, self._half_closed)
        for cycle in (answering, *(cycle for cycle, _ in self.pipeline)):
            cycle.transport = self.transport
        if answering.response_started:
            self._half_closed.watch_flow(self._between(answering))
        else:
            self._half_closed.watch()

    def _between(self, answering: Any) -> bytes:
        """What may be sent between two parts of the answer that is under way."""
        return b"0" if answering.chunked_encoding else b""

    def shutdown(self) -> None:
        if self._refusal and self._due:  # said, and lingering
            self.transport.close()
        else:
            super().shutdown()

    # What the parser finds.

    def on_message_begin(self) -> None:
        if self._read_before:
            self._read_before.clear()
        self._phase = HEAD
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._host = None
        self._connection = b""
        self._chunked = self._is_forwarded = self._prefers = self._has_to_wait = False
        self._upgrade = b""

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase is BODY:
            return  # a trailer: whoever sends one late must not change what was checked
        name, value = name.lower(), value.rstrip(b" \t")
        if name in _WATCHED:
            if not self._take(name, value):
                return
        elif name[:10] == _OURS:
            return
        self.headers.append((name, value))
        if len(self.headers) > MAX_HEADERS:
            raise Refused(431, f"the request has more than {MAX_HEADERS} header lines: send fewer")

    def on_headers_complete(self) -> None:
        self._check_head()
        if self._connection not in _NAMES_NOTHING:
            named = {name.strip().lower() for name in self._connection.split(b",")} - _END_TO_END
            self.headers[:] = [(name, value) for name, value in self.headers if name not in named]
        if self.parser.should_upgrade():
            self._again = True
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            raise Refused(429, f"{MAX_PIPELINED} requests of this connection wait for their answers already: read those, then send more")
        self._begin()
        self._phase, self._advanced = BODY, True

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._advanced = not self.cycle.response_complete

    def on_message_complete(self) -> None:
        if self._again:
            return
        super().on_message_complete()
        self._phase, self._advanced = NOTHING, True

    def _begin(self) -> None:
        """Hands the request, whose head has been read, to the app."""
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()  # makes a scope
        self.url, self.expect_100_continue = url, expects
        self.headers = self.scope["headers"] = headers
        if self._is_forwarded:
            cast(Any, self.scope)[PREFIX] = self._prefix()
        self.scope["scheme"], self.scope["client"] = self._scheme_and_client()
        super().on_headers_complete()

    def _prefix(self) -> str:
        """Returns what a server in front took away from the path, as it says."""
        return self._forwarders.prefix(self.headers, self.client) if self._is_forwarded else ""

    def _scheme_and_client(self) -> tuple[str, tuple[str, int] | None]:
        if not self._is_forwarded:
            return self.scheme or "http", self.client
        return self._forwarders.read(self.headers, self.scheme or "http", self.client)

    def _feed(self, data: bytes) -> None:
        rest: bytes | memoryview = data
        while rest:
            try:
                return self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as offer:
                # The parser takes an `Upgrade` for the end of HTTP, and the body for something else. h2c is offered by many a client with
                # every request: the head of such a request is read again without the offer.
                rest = memoryview(rest)[offer.args[0] :]
                if self._upgrade == b"websocket" and is_handshake(self.parser):
                    return self._begin_websocket(len(rest))
                head = without_upgrade(self.parser, self.url, self.headers, chunked=self._chunked)
                self._again = False
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does: it is ignored
                self._read = head
                self.parser.feed_data(head)
                self._read = data

    def _begin_websocket(self, more: int) -> None:
        """Leaves the connection to another protocol, in which the handshake is answered."""
        if more or self._chunked or has_body(self.headers):
            raise Refused(400, "a WebSocket handshake has no body, and nothing may follow it before its answer")
        if self._answering is not None and not self._answering.response_complete:
            raise Refused(400, "requests of this connection wait for their answers: open a WebSocket on a connection of its own")
        self._left = True
        self._stop_timers()
        self.connections.discard(self)
        left: Any = self
        left.parser = None  # as at the end of the connection: the two hold each other
        WebSocketProtocol(self).begin(self.transport, self.url, self.headers, *self._scheme_and_client())

    def _take(self, name: bytes, value: bytes) -> bool:
        """Notes a header that this edge acts on; whether it is for the app too."""
        match name:
            case b"host":
                if self._host is not None or not _HOST.fullmatch(value):
                    raise Refused(400, "there must be one Host header, with a host name and perhaps a port")
                self._host = value
                return True
            case b"connection":
                self._connection = b"%b,%b" % (self._connection, value) if self._connection else value
            case b"content-length":
                if int(value) > MAX_BODY_BYTES:  # digits only: the parser has seen to it
                    size = f"{value.decode()} bytes and the limit is {MAX_BODY_BYTES}"
                    raise Refused(413, f"the body has {size}: send less, or a reference to it")
                return True
            case b"expect":
                self.expect_100_continue = value.lower() == b"100-continue"
                return True
            case b"upgrade":
                self._upgrade = value.lower()
            case b"x-forwarded-for" | b"x-forwarded-proto" | b"x-forwarded-prefix":
                self._is_forwarded = True
                return True
            case b"prefer":
                self._prefers = True
                return True
            case b"last-event-id" | b"idempotency-key" | b"x-not-before":
                self._has_to_wait = True
                return True
            case b"transfer-encoding":
                if value.lower() != b"chunked":
                    raise Refused(501, "the only transfer coding here is chunked: send the body as it is")
                self._chunked = True
        return False

    def _check_head(self) -> None:
        version = self.parser.get_http_version()
        if version == "1.1":
            if self._host is None:
                raise Refused(400, "there must be one Host header, with a host name and perhaps a port")
        elif version != "1.0":
            raise Refused(505, f"this is HTTP/1.1, and the request says {version}")
        elif self._chunked:
            raise Refused(400, "HTTP/1.0 has no chunked bodies: send a Content-Length")
        if b" %b HTTP/" % self.url not in self._read:  # the parser takes RTSP and ICE for HTTP, and does not tell
            check_protocol(self.url, b"".join([*self._read_before, self._read]))
        if self.parser.should_upgrade() and self.parser.get_method() == b"CONNECT":
            raise Refused(501, "there are no tunnels here")
        if self.url[:1] != b"/":
            self.url = origin_form(self.url, self.parser.get_method(), self._host or b"")
        if b"#" in self.url:
            raise Refused(400, "a request target has no fragment: leave out what follows the #, or write %23")
        if len(self.url) > 0xFFFF:  # all that httptools can parse
            raise Refused(431, f"the request target has {len(self.url)} bytes: send less, or send it in the body")

    # Bounds of time and memory.

    def _watch(self, size: int) -> None:
        """After `size` more bytes: what has begun must go on, and what the parser keeps must not grow for ever."""
        if self._advanced:
            self._advanced = False
            self._loose_bytes = 0
            if self._phase is NOTHING:
                if self.cycle.response_complete:
                    self._expect_within(self.timeout_keep_alive)
                else:
                    self._due = 0.0
            else:
                self._expect_within(self.body_timeout_s if self._phase is BODY else self.head_timeout_s)
        elif self._phase is BODY and self.cycle.response_complete:
            pass  # a body that nobody wants any more is discarded, until `_due`
        else:
            if self._phase is not BODY and not self._loose_bytes:
                self._expect_within(self.head_timeout_s)
            self._loose_bytes += size
            if self._loose_bytes > MAX_LOOSE_BYTES:
                self._refuse(Refused(431, _TOO_LONG))

    def _expect_within(self, seconds: float) -> None:
        self._due = self.loop.time() + seconds
        if self._timer is not None and self._timer.when() > self._due:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self.loop.call_at(self._due, self._look_at_the_clock)

    def _look_at_the_clock(self) -> None:
        self._timer = None
        if not self._due or self.transport.is_closing():
            return
        if self.flow.read_paused:  # by us: requests before this one are being answered
            self._expect_within(self.body_timeout_s)
        elif self._due > self.loop.time():
            self._timer = self.loop.call_at(self._due, self._look_at_the_clock)
        elif self._refusal or not (self._loose_bytes or self._phase is not NOTHING):
            self.transport.close()  # it lingered, or nothing ever came
        else:
            what, seconds = ("more of the body", self.body_timeout_s) if self._phase is BODY else ("the head", self.head_timeout_s)
            self._refuse(Refused(408, f"{what} has not come within {seconds:g} s: send the request without a pause"))

    # Answers.

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        if self._half_closed is not None:
            self._half_closed.watch()
        super()._start_asgi_task(cycle, partial(self._run, cycle, app))

    async def _run(self, cycle: RequestResponseCycle, app: Any, scope: Any, receive: Any, send: Any) -> None:
        """Runs the app. An answer that it gives up after the head, or that this proxy outlives, is cut so that the client sees it."""
        scope[CUT] = partial(self._cut, cycle)
        try:
            await app(scope, receive, until_the_end(cycle) if scope["http_version"] == "1.0" else send)
        except CutShort:
            self._cut(cycle)
        except asyncio.CancelledError:
            if not cycle.response_started or cycle.response_complete:
                raise
            self._cut(cycle)
        finally:
            scope.pop(CUT, None)  # the cycle has the scope, so they would keep each other

    def _cut(self, cycle: Any) -> None:
        if not cycle.disconnected:
            logger.info(
                "the connection of %s is closed before the end of its answer, so that the client sees that it is not whole", self.client
            )
            cut(cycle, self.transport)
            self._flush.watch(self.transport)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._flush.watch(self.transport)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._flush.taken += 1

    def on_response_complete(self) -> None:
        if not self.flow.write_paused:
            self._flush.taken += 1
        if self._refusal and not self.pipeline:
            self._say_refusal()
            return
        self._flush.watch(self.transport)
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._phase is BODY and self.cycle.response_complete:
            self._expect_within(self.linger_s)  # answered before its body was in
        elif self._phase is NOTHING and not self._loose_bytes:
            self._expect_within(self.timeout_keep_alive)

    def _refuse(self, refused: Refused) -> None:
        """Says so after what is still to be answered, and closes; what comes in from here on is discarded."""
        logger.info("refused a request of %s with %d: %s", self.client, refused.status, printable(refused.detail))
        status, headers, body = problem(refused.status, refused.detail, mint_id())
        headers = [*self.server_state.default_headers, *headers, (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        self._refusal = b"".join([STATUS_LINE[status], *(b"%b: %b\r\n" % pair for pair in headers), b"\r\n", body])
        self._due = 0.0
        if self._phase is BODY:  # then it is `cycle` that is refused
            if self.cycle.response_started:
                return self.transport.close()  # it has an answer, or half of one
            self._give_up(self.cycle)
            if self.pipeline and self.pipeline[0][0] is self.cycle:
                self.pipeline.popleft()
        if self._answering is None or self._answering.response_complete:
            self._say_refusal()

    def _say_refusal(self) -> None:
        if self.transport.is_closing():
            return
        self.transport.write(self._refusal)
        if self._half_closed is not None:
            return self.transport.close()  # it would linger for bytes that do not come
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._expect_within(self.linger_s)

    def _give_up(self, cycle: RequestResponseCycle) -> None:
        """Whoever reads its body or waits with it is told that the client is gone."""
        cycle.disconnected = cycle.response_complete = True
        cycle.message_event.set()
