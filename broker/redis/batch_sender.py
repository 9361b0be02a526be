"""Sends batches of commands over a kept wire: each within a budget of time, and once more if the connection ended under way."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from typing import Any

from ..process.tasks import Tasks
from .hot_wire import HotWire, Lost
from .kept_wire import KeptWire

CALL_BUDGET_S = 3.0
REPLY_S = 2.0  # a later reply means that the connection is dead: there is time for another one within the budget
TRIES = 2


class Batch(ABC):
    """Commands that leave together. They may be sent twice, so running them again must do no harm."""

    __slots__ = ("began", "count", "tries_left")

    def __init__(self, count: int) -> None:
        self.began = time.monotonic()
        self.count = count  # of the commands
        self.tries_left = TRIES

    @property
    def left_s(self) -> float:
        return self.began + CALL_BUDGET_S - time.monotonic()

    @abstractmethod
    def packed_for(self, wire: HotWire) -> bytes:
        """The commands, for this connection."""

    @abstractmethod
    def replied(self, replies: list[Any] | Exception) -> None:
        """Takes the replies, or the reason why there are none. Called once for each `BatchSender.send` of this batch."""


class BatchSender:
    """Each batch that was sent gets its replies or an error within CALL_BUDGET_S, unless the wire is closed first."""

    def __init__(self, wire: KeptWire) -> None:
        self._wire = wire
        self._tasks = Tasks()  # dials

    def __repr__(self) -> str:
        return f"<BatchSender over {self._wire!r}>"

    def close(self) -> None:
        """Closes the wire. Batches under way get no reply."""
        self._tasks.cancel()
        self._wire.close()

    def hang_up(self) -> None:
        self._wire.hang_up()

    def send(self, batch: Batch) -> None:
        if (wire := self._wire.wire) is None:
            self._tasks.start(self._send_anew(batch))
            return
        batch.tries_left -= 1
        wire.ask(batch.packed_for(wire), batch.count, lambda replies: self._replied(batch, replies), min(REPLY_S, batch.left_s))

    async def _send_anew(self, batch: Batch) -> None:
        try:
            async with asyncio.timeout(batch.left_s):
                await self._wire.open()
        except Exception as error:
            batch.replied(error)
        else:
            self.send(batch)

    def _replied(self, batch: Batch, replies: list[Any] | Exception) -> None:
        if self._wire.is_closed:
            return
        if isinstance(replies, Exception) and isinstance(replies, Lost | TimeoutError) and batch.tries_left > 0 and batch.left_s > 0:
            self.send(batch)
        else:
            batch.replied(replies)
