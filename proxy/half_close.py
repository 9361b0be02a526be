"""Clients that close their side after the request and still wait for the answer, as `nc -N` and old clients do.

TCP does not tell them from clients that have gone: both have sent a FIN. A write tells: the host of a closed socket answers with a reset,
and the next write fails. So such a client is sent the first bytes of its answer, one at a time, ahead of the rest. All answers begin with
the same bytes.

In an answer that flows the client is sent bytes between two parts of it: a zero before the length of the next chunk, or a comment among
server-sent events. Otherwise a client that has gone is noticed when the next part is written.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, Transport
from asyncio.events import TimerHandle
from typing import Any

BEGINNING = b"HTTP/1.1 "
FIRST_S = 0.1
FACTOR = 3  # the pauses grow by this factor: nine bytes last for a quarter of an hour
LONGEST_S = 60.0  # in an answer that flows


class HalfClosed:
    """The transport to a half-closed client. After `watch`, the next `write` must start with the beginning of an answer."""

    def __init__(self, transport: Transport, loop: AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._ahead = 0  # bytes that are already written of the next answer, or before the next part of one that flows
        self._between = b""  # what may be sent between two parts of the answer that flows
        self._timer: TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<HalfClosed {self._transport!r}, {self._ahead} bytes ahead>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def watch(self) -> None:
        """Sends one byte of the next answer after each pause, until the answer is written or the transport closes."""
        self._between = b""
        self._set_timer(FIRST_S)

    def watch_flow(self, between: bytes) -> None:
        """Sends `between` in the same way, as long as the answer flows and its next part does not come."""
        self._between = between
        if between:
            self._set_timer(FIRST_S)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def write(self, data: bytes) -> None:
        if self._between:
            self._transport.write(data)
        else:
            self.stop()
            self._transport.write(data[self._ahead :])
        self._ahead = 0

    def _set_timer(self, pause_s: float) -> None:
        self.stop()
        self._timer = self._loop.call_later(pause_s, self._probe, pause_s)

    def _probe(self, pause_s: float) -> None:
        if self._transport.is_closing():
            return
        if self._ahead < len(BEGINNING):
            self._transport.write(self._between or BEGINNING[self._ahead : self._ahead + 1])
            self._ahead += 1
        if self._between:
            self._set_timer(min(pause_s * FACTOR, LONGEST_S))
        elif self._ahead < len(BEGINNING):
            self._set_timer(pause_s * FACTOR)
