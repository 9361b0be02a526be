"""Reads the inbox of this process over a wire of its own: the server always has the next BLMPOP, so that entries never wait for us."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from redis.exceptions import InvalidResponse

from ..backoff import delays
from .client import FAILURES, naming_the_key
from .hot_wire import CLOSED_BY_US, HotWire, Lost, packed

BLOCK_S = 5.0
REPLY_S = BLOCK_S + 3.0
OUTSTANDING = 2
BATCH = 256
SWALLOWING_S = OUTSTANDING * BLOCK_S + 1.0

Dial = Callable[[], Awaitable[HotWire]]


class InboxReader:
    """Passes on the entries of one inbox, in no promised order. `on_gap` is called whenever some may have been missed. `on_failed` is
    called with each error that ended a connection, and with whether the server had answered over it.

    Entries that were popped for a connection that broke are lost; their results are not, and `on_gap` has them read by key. If the network
    was cut without a FIN, the server goes on popping for the old connection until its BLMPOPs time out. So after a redial `on_gap` is
    called a second time, when that is over (`SWALLOWING_S`).
    """

    def __init__(
        self,
        inbox: str,
        dial: Dial,
        on_notes: Callable[[list[bytes]], None],
        on_gap: Callable[[], None],
        on_failed: Callable[[Exception, bool], Awaitable[None]],
    ) -> None:
        self._inbox = inbox
        self._command = packed("BLMPOP", BLOCK_S, 1, inbox, "LEFT", "COUNT", BATCH)
        self._dial = dial
        self._on_notes = on_notes
        self._on_gap = on_gap
        self._on_failed = on_failed
        self._wire: HotWire | None = None
        self._gap_again: asyncio.TimerHandle | None = None
        self._was_answered = False  # by the current connection: a server may answer a PING, and refuse this

    def __repr__(self) -> str:
        return f"<InboxReader of {self._inbox}, {self._wire!r}>"

    async def run(self) -> None:
        """Reads until cancelled; dials again after each failure."""
        pauses = delays()
        try:
            while True:
                try:
                    self._was_answered, is_redial = False, self._wire is not None
                    self._wire = await self._dial()
                    await self._read(self._wire, is_redial)
                except FAILURES as error:
                    if self._was_answered:
                        pauses = delays()
                    await self._on_failed(error, self._was_answered)
                    await asyncio.sleep(next(pauses))
        finally:
            self._forget_the_gap()

    async def _read(self, wire: HotWire, is_redial: bool) -> None:
        """Reads until the connection ends; raises why."""
        try:
            self._on_gap()
            if is_redial:
                self._forget_the_gap()
                self._gap_again = asyncio.get_running_loop().call_later(SWALLOWING_S, self._on_gap)
            for _ in range(OUTSTANDING):
                self._ask(wire)
            raise await wire.ended
        finally:
            wire.end(Lost(CLOSED_BY_US))

    def _forget_the_gap(self) -> None:
        if self._gap_again is not None:
            self._gap_again.cancel()

    def _ask(self, wire: HotWire) -> None:
        wire.ask(self._command, 1, self._replied, REPLY_S)

    def _replied(self, replies: list[Any] | Exception) -> None:
        wire = self._wire
        if isinstance(replies, Exception) or wire is None:
            return  # the connection has ended, and `_read` knows
        notes = _notes_of(replies[0], self._inbox)
        self._was_answered = True
        if notes:
            self._on_notes(notes)
        self._ask(wire)


def _notes_of(reply: Any, inbox: str) -> list[bytes]:
    """The entries of a reply to BLMPOP. Raises what the reply says, or InvalidResponse."""
    if reply is None:
        return []
    if isinstance(reply, Exception):
        raise naming_the_key(reply, ("BLMPOP", inbox))
    match reply:
        case [bytes(), [*notes]] if all(isinstance(note, bytes) for note in notes):
            return notes
    raise InvalidResponse("no reply to BLMPOP")
