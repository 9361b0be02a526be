"""Writes batches of results, and the marks that go with them: one script call for all results of a batch."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from redis.exceptions import InvalidResponse, NoScriptError

from ..errors import StoreUnavailable
from ..process.tasks import Tasks
from ..store import Record
from ..store_keys import INBOX_TTL_S, RESULT_TTL_S
from .client import FAILURES, naming_the_key
from .hot_wire import Lost, packed
from .kept_wire import KeptWire
from .result_writer import Mark, OnWritten

CALL_BUDGET_S = 3.0
REPLY_S = 2.0  # a later reply means that the connection is dead: there is time for another one within the budget
TRIES = 2
INBOX_WAS_ODD = 2  # of record.lua
TEXT = (Path(__file__).parent / "record.lua").read_text()
_DIGEST = hashlib.sha1(TEXT.encode(), usedforsecurity=False).hexdigest()


class _Call:
    """One batch on its way."""

    __slots__ = ("began", "by_text", "commands", "count", "marks", "on_written", "records", "tries_left")

    def __init__(self, records: Sequence[Record], marks: Sequence[Mark], on_written: OnWritten) -> None:
        self.records = records
        self.marks = marks
        self.on_written = on_written
        self.began = time.monotonic()
        self.tries_left = TRIES
        self.by_text = False
        script = [self._script("EVALSHA", _DIGEST)] if records else []
        self.commands = b"".join([*(_packed_mark(mark) for mark in marks), *script])
        self.count = len(marks) + len(script)

    @property
    def left_s(self) -> float:
        return self.began + CALL_BUDGET_S - time.monotonic()

    @property
    def keys(self) -> list[str]:
        return [record.key for record in self.records]

    def say_the_script(self) -> None:
        """The server does not know it any more. It has taken the marks."""
        self.marks, self.by_text = (), True
        self.commands, self.count = self._script("EVAL", TEXT), 1

    def _script(self, *how: str) -> bytes:
        values: list[bytes | str | int] = [RESULT_TTL_S * 1000, INBOX_TTL_S * 1000]
        for record in self.records:
            values += (record.value, record.note, record.inbox)
        return packed(*how, len(self.records), *self.keys, *values)


class RecordScript:
    """Writes one batch at a time over `wire`. Each call ends within CALL_BUDGET_S, by a number for each result (see record.lua) or by an
    error. If the connection ends under way, the batch is sent once more over another one: the script knows what it has written.

    `on_wrote` is called after each success, and `on_odd_inbox` for each inbox that was a key of another type. `on_failed` gets each error,
    when its call began, and whether that was to write something new; it returns the error as StoreUnavailable.
    """

    def __init__(
        self,
        wire: KeptWire,
        on_wrote: Callable[[], None],
        on_odd_inbox: Callable[[str], None],
        on_failed: Callable[[Exception, float, bool], StoreUnavailable],
    ) -> None:
        self._wire = wire
        self._on_wrote = on_wrote
        self._on_odd_inbox = on_odd_inbox
        self._on_failed = on_failed
        self._tasks = Tasks()  # dials

    def __repr__(self) -> str:
        return f"<RecordScript over {self._wire!r}>"

    def close(self) -> None:
        """Closes the wire: calls under way are never told."""
        self._tasks.cancel()
        self._wire.close()

    def write(self, records: Sequence[Record], marks: Sequence[Mark], on_written: OnWritten) -> None:
        """Writes marks and results, in this order. `on_written` is called once, later."""
        self._send(_Call(records, marks, on_written))

    def _send(self, call: _Call) -> None:
        if (wire := self._wire.wire) is None:
            self._tasks.start(self._send_anew(call))
            return
        call.tries_left -= 1
        wire.ask(call.commands, call.count, lambda replies: self._replied(call, replies), min(REPLY_S, call.left_s))

    async def _send_anew(self, call: _Call) -> None:
        try:
            async with asyncio.timeout(call.left_s):
                await self._wire.open()
        except Exception as error:
            self._fail(call, error)
        else:
            self._send(call)

    def _replied(self, call: _Call, replies: list[Any] | Exception) -> None:
        if self._wire.is_closed:
            return
        if isinstance(replies, Exception):
            if call.tries_left > 0 and call.left_s > 0 and isinstance(replies, Lost | TimeoutError):
                return self._send(call)
            return self._fail(call, replies)
        marked = self._marked(call, replies)
        if call.records:
            self._written(call, replies[-1])
        else:
            if marked:
                self._on_wrote()
            call.on_written([])

    def _marked(self, call: _Call, replies: list[Any]) -> bool:
        """Whether the server took a mark that needs memory. A mark that it refuses is lost."""
        marked = False
        for (key, _, ttl_ms), reply in zip(call.marks, replies, strict=False):
            if isinstance(reply, Exception):
                self._on_failed(naming_the_key(reply, ("SET" if ttl_ms else "PEXPIRE", key)), call.began, ttl_ms > 0)
            else:
                marked = marked or ttl_ms > 0
        return marked

    def _written(self, call: _Call, reply: Any) -> None:
        if isinstance(reply, NoScriptError) and not call.by_text:  # the server was restarted
            call.say_the_script()
            self._send(call)
        elif isinstance(reply, Exception):
            self._fail(call, naming_the_key(reply, ("EVALSHA", *call.keys)))
        elif isinstance(reply, list) and len(reply) == len(call.records) and all(type(how) is int for how in reply):
            self._on_wrote()
            for record, how in zip(call.records, reply, strict=True):
                if how == INBOX_WAS_ODD:
                    self._on_odd_inbox(record.inbox)
            call.on_written(reply)
        else:
            self._wire.hang_up()
            self._fail(call, InvalidResponse("no reply to the record script"))

    def _fail(self, call: _Call, error: Exception) -> None:
        """An error that no server causes is passed on as it is."""
        call.on_written(self._on_failed(error, call.began, True) if isinstance(error, FAILURES) else error)


def _packed_mark(mark: Mark) -> bytes:
    key, value, ttl_ms = mark
    if ttl_ms:
        return packed("SET", key, value, "PX", ttl_ms)
    return packed("PEXPIRE", key, 0)  # deletes it; whoever may not DEL may do this
