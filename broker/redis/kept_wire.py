"""A connection to Redis that is opened when it is needed, and anew after it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from .client import naming_the_key
from .hot_wire import CLOSED_BY_US, HotWire, Lost, packed


class KeptWire:
    """Keeps one wire for all who ask. `dial` opens it; after `close` there is none.

    `reply_s` is the time for each reply of `ask`, see `HotWire.ask`. It is for connections that are dead though nobody was told: there must
    be time for another one within the caller's own budget.
    """

    def __init__(self, dial: Callable[[], Awaitable[HotWire]], reply_s: float, *, in_parts: bool = False) -> None:
        self._dial = dial
        self._reply_s = reply_s
        self._in_parts = in_parts
        self._dialling = asyncio.Lock()
        self._wire: HotWire | None = None
        self.is_closed = False

    def __repr__(self) -> str:
        return f"<KeptWire {'closed' if self.is_closed else repr(self._wire)}>"

    @property
    def wire(self) -> HotWire | None:
        """The wire, if one is open."""
        return self._wire if self._wire is not None and self._wire.is_open else None

    async def open(self) -> HotWire:
        """The wire; dials if none is open. Raises what `dial` raises, or Lost after `close`."""
        async with self._dialling:
            wire = self.wire
            if wire is None and not self.is_closed:
                wire = self._wire = await self._dial()
            if wire is None or self.is_closed:  # perhaps since the dial
                self.hang_up()
                raise Lost(CLOSED_BY_US)
            return wire

    async def ask(self, *command: str | bytes) -> Any:
        """Sends one short command, and returns the reply: a quarter of what redis-py takes. It must be one that may run twice, since it is
        sent once more if the connection ends under way. Raises what the server says, or why the connection ended; the caller sets a time
        of its own for all of it."""
        try:
            return await self._ask(command)
        except (Lost, TimeoutError):
            return await self._ask(command)

    async def _ask(self, command: Sequence[str | bytes]) -> Any:
        wire = await self.open()
        answer: asyncio.Future[list[Any] | Exception] = asyncio.get_running_loop().create_future()

        def replied(replies: list[Any] | Exception) -> None:
            if not answer.done():  # who waited may have been cancelled
                answer.set_result(replies)

        wire.ask(packed(*command), 1, replied, self._reply_s, in_parts=self._in_parts)
        replies = await answer
        if isinstance(replies, Exception):
            raise replies
        if isinstance(replies[0], Exception):
            raise naming_the_key(replies[0], command)
        return replies[0]

    def hang_up(self) -> None:
        """Leaves this connection: whoever asks next opens another one, perhaps to another server."""
        if self._wire is not None:
            self._wire.end(Lost(CLOSED_BY_US))

    def close(self) -> None:
        """Ends the connection, and one that is being dialled as soon as it is open."""
        self.is_closed = True
        self.hang_up()
