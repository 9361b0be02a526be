"""Writes batches of Appends: one script call for all of a batch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from redis.exceptions import InvalidResponse, NoScriptError

from ..errors import StoreUnavailable
from ..store import Append, Refusal
from ..store_keys import INBOX_TTL_S, RESULT_TTL_S
from ..streams import note_of
from .append_writer import OnWritten
from .batch_sender import Batch, BatchSender
from .client import FAILURES, naming_the_key
from .hot_wire import HotWire, packed
from .kept_wire import KeptWire

TEXT = (Path(__file__).parent / "append.lua").read_text()
_DIGEST = hashlib.sha1(TEXT.encode(), usedforsecurity=False).hexdigest()
_REFUSALS = {-1: Refusal.ENDED, -2: Refusal.TAKEN}  # of append.lua
_SWEEP_ABOVE = 256  # streams
_RENEWED_AFTER_S = 30.0  # a stream lives twenty times longer, and for a minute more than any wait between two appends


class _Known(NamedTuple):
    """What this process has done to a stream over the present connection."""

    trimmed_to: int = 0
    expires_at: float = 0.0  # monotonic

    def needs_trim(self, append: Append) -> bool:
        return append.trim_to > self.trimmed_to or append.trim_to >= append.first

    def needs_renewal(self, append: Append, now: float) -> bool:
        return now + append.ttl_ms / 1000 > self.expires_at + _RENEWED_AFTER_S or bool(append.ends)


_UNKNOWN = _Known()


class _Call(Batch):
    """One batch on its way."""

    __slots__ = ("appends", "at", "by_text", "on_written", "script")

    def __init__(self, script: AppendScript, appends: Sequence[Append], on_written: OnWritten) -> None:
        super().__init__(1)
        self.script = script
        self.appends = appends
        self.on_written = on_written
        self.by_text = False
        self.at = 0.0  # monotonic; when it was packed

    def packed_for(self, wire: HotWire) -> bytes:
        how = ("EVAL", TEXT) if self.by_text else ("EVALSHA", _DIGEST)
        known = self.script.known_to(wire)
        self.at = time.monotonic()
        keys: list[str] = []
        values: list[str | bytes | int] = [RESULT_TTL_S * 1000, INBOX_TTL_S * 1000]
        for one in self.appends:
            keys += (one.stream, one.owner, one.future)
            before = known.get(one.stream, _UNKNOWN)
            trims, renews = before.needs_trim(one), before.needs_renewal(one, self.at)
            may_lack = one.first > 1 and one.stream not in known
            values += (one.claim, one.attempt, one.first, one.trim_to, int(trims), one.ttl_ms, int(renews), int(may_lack))
            values += (one.ends, one.end_note)
            notes = [note_of(one.id, seq, frame) for seq, frame in enumerate(one.frames, one.first)]
            values += (len(notes), len(one.inboxes), *notes, *one.inboxes)
        return packed(*how, len(keys), *keys, *values)

    def replied(self, replies: list[Any] | Exception) -> None:
        self.script.replied(self, replies)


class AppendScript:
    """Writes one batch at a time over `wire`. Each call ends within CALL_BUDGET_S. If the connection ends under way, the batch is sent once
    more over another one: the script knows what it has written.

    Another connection may be to a server that was restarted and lost what it had taken last. So the script looks where a stream ends before
    it appends to it for the first time over a connection.

    `on_wrote`, `on_odd_key` and `on_failed` are called as those of `RecordScript` are.
    """

    def __init__(
        self,
        wire: KeptWire,
        on_wrote: Callable[[], None],
        on_odd_key: Callable[[str], None],
        on_failed: Callable[[Exception, float, bool], StoreUnavailable],
    ) -> None:
        self._sender = BatchSender(wire)
        self._on_wrote = on_wrote
        self._on_odd_key = on_odd_key
        self._on_failed = on_failed
        self._known: dict[str, _Known] = {}  # streams that were appended to over `_known_to`, and may go on
        self._known_to: HotWire | None = None
        self._sweep_above = _SWEEP_ABOVE

    def __repr__(self) -> str:
        return f"<AppendScript by {self._sender!r}, {len(self._known)} streams>"

    def close(self) -> None:
        """Closes the wire: calls under way are never told."""
        self._sender.close()

    def hang_up(self) -> None:
        """Leaves this connection: the next batch goes over another one, perhaps to another server."""
        self._sender.hang_up()

    def write(self, appends: Sequence[Append], on_written: OnWritten) -> None:
        """`on_written` is called once, later."""
        self._sender.send(_Call(self, appends, on_written))

    def known_to(self, wire: HotWire) -> dict[str, _Known]:
        """The streams that this connection's server has up to their last frame."""
        if wire is not self._known_to:
            self._known_to, self._known = wire, {}
        return self._known

    def replied(self, call: _Call, replies: list[Any] | Exception) -> None:
        if isinstance(replies, Exception):
            return self._fail(call, replies)
        match replies[0]:
            case NoScriptError() if not call.by_text:  # the server was restarted
                call.by_text = True
                self._sender.send(call)
            case Exception() as error:
                self._fail(call, naming_the_key(error, ("EVALSHA", *(one.stream for one in call.appends))))
            case [[*ends], [*odd]] if len(ends) == len(call.appends) and all(type(end) is int and end >= -2 for end in ends):
                self._written(call, ends, odd)
            case _:
                self._sender.hang_up()
                self._fail(call, InvalidResponse("no reply to the append script"))

    def _written(self, call: _Call, ends: list[int], odd: list[Any]) -> None:
        self._on_wrote()
        for key in odd:
            self._on_odd_key(key.decode(errors="replace") if isinstance(key, bytes) else str(key))
        if len(self._known) > self._sweep_above:
            self._sweep(call.at)
        for one, end in zip(call.appends, ends, strict=True):
            if end < one.first - 1 or one.ends:  # a refusal, a gap, or over
                self._known.pop(one.stream, None)
            else:
                before = self._known.get(one.stream, _UNKNOWN)
                expires_at = call.at + one.ttl_ms / 1000 if before.needs_renewal(one, call.at) else before.expires_at
                self._known[one.stream] = _Known(one.trim_to, expires_at)
        call.on_written([_REFUSALS.get(end, end) for end in ends])

    def _sweep(self, now: float) -> None:
        """Forgets the streams whose keys have expired: most that were given up get no end over this connection."""
        self._known = {stream: known for stream, known in self._known.items() if known.expires_at > now}
        self._sweep_above = max(_SWEEP_ABOVE, 2 * len(self._known))

    def _fail(self, call: _Call, error: Exception) -> None:
        """An error that no server causes is passed on as it is."""
        for one in call.appends:
            self._known.pop(one.stream, None)
        call.on_written(self._on_failed(error, call.began, True) if isinstance(error, FAILURES) else error)
