"""Clients that close their side after the request and still wait for the answer, as `nc -N` and old clients do.

TCP does not tell them from clients that have gone: both have sent a FIN. A write tells: the host of a closed socket answers with a reset,
and the next write fails. So such a client is sent the first bytes of its answer, one at a time, ahead of the rest. All answers begin with
the same bytes.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, Transport
from asyncio.events import TimerHandle
from typing import Any

BEGINNING = b"HTTP/1.1 "
FIRST_S = 0.1
FACTOR = 3  # the pauses grow by this factor: nine bytes last for a quarter of an hour


class HalfClosed:
    """The transport to a half-closed client. After `watch`, the next `write` must start with the beginning of an answer."""

    def __init__(self, transport: Transport, loop: AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._ahead = 0  # bytes of the next answer that are already written
        self._timer: TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<HalfClosed {self._transport!r}, {self._ahead} bytes ahead>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def watch(self, pause_s: float = FIRST_S) -> None:
        """Sends one byte of the next answer after each pause, until the answer is written or the transport closes."""
        self.stop()
        self._timer = self._loop.call_later(pause_s, self._probe, pause_s)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def write(self, data: bytes) -> None:
        self.stop()
        self._transport.write(data[self._ahead :])
        self._ahead = 0

    def _probe(self, pause_s: float) -> None:
        if self._ahead < len(BEGINNING) and not self._transport.is_closing():
            self._transport.write(BEGINNING[self._ahead : self._ahead + 1])
            self._ahead += 1
            self.watch(pause_s * FACTOR)
