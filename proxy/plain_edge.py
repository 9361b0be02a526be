"""Plain requests: from the parser to the app and back without ASGI.

uvicorn makes a scope, a cycle, an event, a task and a timer for each request, and writes head and body one after the other. A request that
came whole in one read, while no other one of its connection is being answered and no middleware wants it, needs none of them: it is one
object, `PlainCall`, and its answer one write. So is a job whose client waits for nothing but the promise (`PlainJob`). All other requests
take uvicorn's path: more of the body is still to come, they are pipelined, they ask for `100 Continue` or for what has to be awaited, their
client has closed its side or does not take its answers, or their path may be under `/-/`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from ..broker.process.printable import printable
from .calls import PlainCall, PlainJob
from .edge import NOTHING, EdgeProtocol
from .request_line import Refused
from .responses import Reply, with_length
from .streaming import CutShort, Flow, FlowEnd

logger = logging.getLogger(__name__)

JOINED_BYTES = 64 * 1024  # a larger body is not copied behind its head

APART: tuple[bytes, ...] = (b"/-", b"/%")  # how a path may begin that is no endpoint's; those are answered by coroutines
_LAST = (b"connection", b"close")  # among the server's headers while it drains


class PlainEdgeProtocol(EdgeProtocol):
    """One connection. `app.plain` is the app for plain requests, or None; the paths that begin as one of `app.apart` are not plain."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outermost: Any = self.app
        self._may_be_plain = False  # only the first request of a read may be: those behind it wait as pipelined requests do
        self._held: list[bytes] | None = None  # the body, so far, of a request that is plain if all of it comes in this read
        self._defaults: list[tuple[bytes, bytes]] = []  # the server's headers, which it makes anew every second, and their lines
        self._default_lines = b""
        self._streamed: tuple[PlainCall, Flow] | None = None  # the answer that flows to this client now

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        connection: Any = self
        if isinstance(connection.cycle, PlainCall):
            connection.cycle = connection._answering = None  # a call and its connection would keep each other

    def on_body(self, body: bytes) -> None:
        if self._held is None:
            super().on_body(body)
        else:
            self._held.append(body)

    def on_message_complete(self) -> None:
        if self._held is None:
            return super().on_message_complete()
        self._phase, self._advanced = NOTHING, True
        parts, self._held = self._held, None
        self._start_plain(parts[0] if len(parts) == 1 else b"".join(parts))

    def answer(self, call: PlainCall, reply: Reply) -> None:
        """Writes the answer to a plain request in one piece, unless it has one or the client has gone."""
        if call.response_complete:
            return
        status, headers, body = with_length(reply, to_head=call.method == "HEAD")
        lines = self._head_lines(call, status, headers)
        lines.append(b"\r\n")
        keep_alive = call.keep_alive
        call.response_started = call.response_complete = True
        if len(body) <= JOINED_BYTES or self._half_closed is not None:
            lines.append(body)
            self.transport.write(b"".join(lines))
        else:
            self.transport.writelines((b"".join(lines), body))
        if not keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _head_lines(self, call: PlainCall, status: int, headers: list[tuple[bytes, bytes]]) -> list[bytes]:
        """Returns the head of an answer but for the empty line, and notes on the call whether it is the connection's last."""
        if self.server_state.default_headers is not self._defaults:
            self._defaults = self.server_state.default_headers
            self._default_lines = b"".join([b"%b: %b\r\n" % pair for pair in self._defaults])
        lines = [STATUS_LINE[status], self._default_lines]
        for name, value in headers:
            lines += (name.lower(), b": ", value, b"\r\n")
        if _LAST in self._defaults:
            call.keep_alive = False
        elif not call.keep_alive:
            lines.append(b"connection: close\r\n")
        return lines

    # Answers that flow. A task for each writes what has come in one turn of the loop as one piece, while the client takes it.

    def stream(self, call: PlainCall, flow: Flow) -> None:
        has_length = any(name == b"content-length" for name, _ in flow.reply[1])
        call.chunked_encoding = not has_length and call.http_version != "1.0"
        call.expected_content_length = 0 if has_length or call.chunked_encoding else math.inf
        self._streamed = (call, flow)
        task = self.loop.create_task(self._pump(call, flow))
        self.tasks.add(task)  # the server cancels it when the time to end has run out
        task.add_done_callback(self.tasks.discard)

    async def _pump(self, call: PlainCall, flow: Flow) -> None:
        ended = FlowEnd.FAILED
        try:
            if call.response_complete:  # the client has gone
                ended = FlowEnd.CANCELLED
            else:
                lines = self._head_lines(call, *flow.reply[:2])
                lines.append(b"transfer-encoding: chunked\r\n\r\n" if call.chunked_encoding else b"\r\n")
                parts = [flow.body.begin(), *flow.body.of(flow.stream.take())]
                call.response_started = True
                self.transport.write(b"".join([*lines, _framed(call, parts)]))
                if self._half_closed is not None:
                    self._half_closed.watch_flow(self._between(call))
                ended = await self._write_parts(call, flow)
        except CutShort as cut:
            ended = cut.end
            logger.info("the answer to request %s is cut: %s", call.id, printable(str(cut)))
            self._cut(call)
        except asyncio.CancelledError:
            self._cut(call)
            raise
        except Exception:
            logger.exception("request %s ended in a bug in mqserve, please report it", call.id)
            self._cut(call)
        finally:
            if self._streamed is not None and self._streamed[0] is call:
                self._streamed = None
            call.app.end_flow(flow, ended)

    async def _write_parts(self, call: PlainCall, flow: Flow) -> FlowEnd:
        stream, body = flow.stream, flow.body
        while (end := stream.end) is None and not body.is_over and not call.response_complete:
            if self.flow.write_paused:
                await self.flow.drain()
            elif (parts := body.of(await stream.more())) and not call.response_complete:
                self.transport.write(_framed(call, parts))
        if call.response_complete:
            return FlowEnd.CANCELLED
        last = b"" if end is None else body.last(end)
        self.transport.write(_framed(call, [last]) + (b"0\r\n\r\n" if call.chunked_encoding else b""))
        call.response_complete = True
        if not call.keep_alive:
            self.transport.close()
        self._streamed = None
        self.on_response_complete()
        return FlowEnd.of(end)

    def _between(self, answering: Any) -> bytes:
        between = super()._between(answering)
        if not between and self._streamed is not None and self._streamed[0] is answering:
            between = self._streamed[1].body.between
        return between

    def _feed(self, data: bytes) -> None:
        self._may_be_plain = True
        super()._feed(data)
        if self._held is not None:  # the rest of its body is still to come
            parts, self._held = self._held, None
            super()._begin()
            for part in parts:
                super().on_body(part)

    def _begin(self) -> None:
        if self._may_be_plain and not self._has_to_wait and self._is_plain():
            self._held = []
        else:
            super()._begin()
        self._may_be_plain = False

    def _is_plain(self) -> bool:
        """Whether the request is plain if its body comes in the same read."""
        return (
            (not self.cycle or self.cycle.response_complete)
            and self._outermost.plain is not None
            and not self.url.startswith(self._outermost.apart)
            and not (self.expect_100_continue or self.flow.write_paused or self._half_closed or self.transport.is_closing())
        )

    def _start_plain(self, body: bytes) -> None:
        call: Any = (PlainJob if self._prefers else PlainCall)(self, self._outermost.plain)
        url = httptools.parse_url(self.url)
        call.raw_path, call.query, call.path = url.path, url.query or b"", url.path.decode("ascii")
        if "%" in call.path:
            call.path = unquote(call.path)
        call.method, call.http_version = self.parser.get_method().decode("ascii"), self.parser.get_http_version()
        call.keep_alive = call.http_version != "1.0" and self.parser.should_keep_alive()
        call.headers, call.server = self.headers, self.server
        call.scheme, call.client = self._scheme_and_client()
        if self._prefers:
            call.prefix = self._prefix()
        before, self.cycle = self.cycle, call
        self._answering = call
        if not call.begin(body):  # it takes uvicorn's path after all
            self.cycle = self._answering = before
            super()._begin()
            super().on_body(body)
            super().on_message_complete()

    def _give_up(self, cycle: Any) -> None:
        super()._give_up(cycle)
        if self._streamed is not None and self._streamed[0] is cycle:
            cycle.app.leave_stream(self._streamed[1].stream)
        elif isinstance(cycle, PlainCall):
            cycle.left()

    def _refuse(self, refused: Refused) -> None:
        if self._held is not None:  # the app has not heard of it
            self._held, self._phase = None, NOTHING
        super()._refuse(refused)


def _framed(call: PlainCall, parts: list[bytes]) -> bytes:
    data = b"".join(parts)
    return b"%x\r\n%b\r\n" % (len(data), data) if data and call.chunked_encoding else data
