"""Writes batches of results, and the marks and posts that go with them: one script call for all results of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from redis.exceptions import InvalidResponse, NoScriptError

from ..errors import StoreUnavailable
from ..store import Record
from ..store_keys import INBOX_TTL_S, RESULT_TTL_S
from .batch_sender import Batch, BatchSender
from .client import FAILURES, naming_the_key
from .hot_wire import HotWire, packed
from .kept_wire import KeptWire
from .refusals import refusal_code
from .result_writer import Mark, OnWritten, Post

INBOX_WAS_ODD = 2  # of record.lua
TEXT = (Path(__file__).parent / "record.lua").read_text()
_DIGEST = hashlib.sha1(TEXT.encode(), usedforsecurity=False).hexdigest()


class _Call(Batch):
    """One batch on its way."""

    __slots__ = ("by_text", "commands", "marks", "on_written", "posts", "records", "script")

    def __init__(
        self, script: RecordScript, records: Sequence[Record], marks: Sequence[Mark], posts: Sequence[Post], on_written: OnWritten
    ) -> None:
        super().__init__(len(marks) + 2 * len(posts) + bool(records))
        self.script = script
        self.records = records
        self.marks = marks
        self.posts = posts
        self.on_written = on_written
        self.by_text = False
        commands = [*map(_packed_mark, marks), *map(_packed_post, posts)]
        if records:
            commands.append(self._script("EVALSHA", _DIGEST, records))
        self.commands = b"".join(commands)

    def packed_for(self, wire: HotWire) -> bytes:
        return self.commands

    def replied(self, replies: list[Any] | Exception) -> None:
        self.script.replied(self, replies)

    @property
    def keys(self) -> list[str]:
        return [record.key for record in self.records]

    def say_the_script(self) -> None:
        """The server does not know it any more. It has taken the marks and the posts."""
        self.marks, self.posts, self.by_text = (), (), True
        self.commands, self.count = self._script("EVAL", TEXT, self.records), 1

    def _script(self, command: str, script: str, records: Sequence[Record]) -> bytes:
        values: list[bytes | str | int] = [RESULT_TTL_S * 1000, INBOX_TTL_S * 1000]
        for record in records:
            values += (record.value, record.note, record.inbox)
        for place, record in enumerate(records, 1):
            if record.ttl_ms:
                values += (place, record.ttl_ms)
        return packed(command, script, len(records), *(record.key for record in records), *values)


class RecordScript:
    """Writes one batch at a time over `wire`. Each call ends within CALL_BUDGET_S, by a number for each result (see record.lua) or by an
    error. If the connection ends under way, the batch is sent once more over another one: the script knows what it has written.

    `on_wrote` is called after each success, `on_odd_inbox` for each inbox that was a key of another type, and `on_odd_list` for each list
    that is one. `on_failed` gets each error, when its call began, and whether that was to write something new; it returns the error as
    StoreUnavailable.
    """

    def __init__(
        self,
        wire: KeptWire,
        on_wrote: Callable[[], None],
        on_odd_inbox: Callable[[str], None],
        on_odd_list: Callable[[str], None],
        on_failed: Callable[[Exception, float, bool], StoreUnavailable],
    ) -> None:
        self._sender = BatchSender(wire)
        self._on_wrote = on_wrote
        self._on_odd_inbox = on_odd_inbox
        self._on_odd_list = on_odd_list
        self._on_failed = on_failed

    def __repr__(self) -> str:
        return f"<RecordScript by {self._sender!r}>"

    def close(self) -> None:
        """Closes the wire: calls under way are never told."""
        self._sender.close()

    def write(self, records: Sequence[Record], marks: Sequence[Mark], posts: Sequence[Post], on_written: OnWritten) -> None:
        """Writes marks, posts and results, in this order. `on_written` is called once, later."""
        self._sender.send(_Call(self, records, marks, posts, on_written))

    def replied(self, call: _Call, replies: list[Any] | Exception) -> None:
        if isinstance(replies, Exception):
            return self._fail(call, replies)
        marked = self._marked(call, replies)
        posted = bool(call.posts) and self._posted(call, replies[len(call.marks) :])
        if call.records:
            self._written(call, replies[-1])
        else:
            if marked or posted:
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

    def _posted(self, call: _Call, replies: list[Any]) -> bool:
        """Whether the server took a post. One that it refuses is lost."""
        posted = False
        for (key, _), reply in zip(call.posts, replies[::2], strict=False):
            if not isinstance(reply, Exception):
                posted = True
            elif refusal_code(reply) == "WRONGTYPE":
                self._on_odd_list(key)
            else:
                self._on_failed(naming_the_key(reply, ("RPUSH", key)), call.began, True)
        return posted

    def _written(self, call: _Call, reply: Any) -> None:
        if isinstance(reply, NoScriptError) and not call.by_text:  # the server was restarted
            call.say_the_script()
            self._sender.send(call)
        elif isinstance(reply, Exception):
            self._fail(call, naming_the_key(reply, ("EVALSHA", *call.keys)))
        elif isinstance(reply, list) and len(reply) == len(call.records) and all(type(how) is int for how in reply):
            self._on_wrote()
            for record, how in zip(call.records, reply, strict=True):
                if how == INBOX_WAS_ODD:
                    self._on_odd_inbox(record.inbox)
            call.on_written(reply)
        else:
            self._sender.hang_up()
            self._fail(call, InvalidResponse("no reply to the record script"))

    def _fail(self, call: _Call, error: Exception) -> None:
        """An error that no server causes is passed on as it is."""
        call.on_written(self._on_failed(error, call.began, True) if isinstance(error, FAILURES) else error)


def _packed_mark(mark: Mark) -> bytes:
    key, value, ttl_ms = mark
    if ttl_ms:
        return packed("SET", key, value, "PX", ttl_ms)
    return packed("PEXPIRE", key, 0)  # deletes it; whoever may not DEL may do this


def _packed_post(post: Post) -> bytes:
    key, entry = post
    return packed("RPUSH", key, entry) + packed("PEXPIRE", key, INBOX_TTL_S * 1000)
