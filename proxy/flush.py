"""Clients that do not read: what they do not take must not stay in our memory, nor hold up a drain."""

from __future__ import annotations

from asyncio import AbstractEventLoop, Transport
from asyncio.events import TimerHandle


class Flush:
    """Aborts a connection whose client takes nothing for `limit_s` of what is written. One timer, while something is left to take."""

    def __init__(self, loop: AbstractEventLoop, limit_s: float) -> None:
        self._loop = loop
        self._limit_s = limit_s
        self._timer: TimerHandle | None = None
        self.taken = 0  # how often the client has taken all of an answer, or enough of one that flows to get more of it

    def __repr__(self) -> str:
        return f"<Flush {'watched' if self._timer else 'idle'}>"

    def watch(self, transport: Transport) -> None:
        if self._timer is None and (left := transport.get_write_buffer_size()):
            self._timer = self._loop.call_later(self._limit_s, self._look, transport, left, self.taken)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, transport: Transport, before: int, taken: int) -> None:
        self._timer = None
        if transport.get_write_buffer_size() >= before and taken == self.taken:
            transport.abort()
        else:
            self.watch(transport)
