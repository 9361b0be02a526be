"""Writes batches of Appends: one script call for all of a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..errors import StoreUnavailable
from ..store import Append, Refusal
from ..store_keys import INBOX_TTL_S, RESULT_TTL_S
from ..streams import note_of
from .append_writer import OnWritten
from .batch_script import BatchScript, ScriptCall
from .hot_wire import HotWire, packed
from .kept_wire import KeptWire

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


class _Call(ScriptCall):
    __slots__ = ("appends", "at", "script")

    def __init__(self, script: AppendScript, appends: Sequence[Append], on_written: OnWritten) -> None:
        super().__init__(on_written)
        self.script = script
        self.appends = appends
        self.at = 0.0  # monotonic; when it was packed

    @property
    def keys(self) -> Sequence[str]:
        return [one.stream for one in self.appends]

    def packed_for(self, wire: HotWire) -> bytes:
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
        return packed(*self.script.command(self), len(keys), *keys, *values)

    def replied(self, replies: list[Any] | Exception) -> None:
        self.script.replied(self, replies)


class AppendScript(BatchScript[_Call]):
    """Writes Appends.

    Another connection may be to a server that was restarted and lost what it had taken last. So the script looks where a stream ends before
    it appends to it for the first time over a connection.
    """

    def __init__(
        self,
        wire: KeptWire,
        on_wrote: Callable[[], None],
        on_odd_key: Callable[[str], None],
        on_failed: Callable[[Exception, float, bool], StoreUnavailable],
    ) -> None:
        super().__init__("append", wire, on_wrote, on_odd_key, on_failed)
        self._known: dict[str, _Known] = {}  # streams that were appended to over `_known_to`, and may go on
        self._known_to: HotWire | None = None
        self._sweep_above = _SWEEP_ABOVE

    def __repr__(self) -> str:
        return f"<AppendScript by {self._sender!r}, {len(self._known)} streams>"

    def write(self, appends: Sequence[Append], on_written: OnWritten) -> None:
        """`on_written` is called once, later."""
        self._sender.send(_Call(self, appends, on_written))

    def known_to(self, wire: HotWire) -> dict[str, _Known]:
        """The streams that this connection's server has up to their last frame."""
        if wire is not self._known_to:
            self._known_to, self._known = wire, {}
        return self._known

    def _are_sound(self, outcomes: list[Any]) -> bool:
        return all(type(end) is int and end >= -2 for end in outcomes)

    def _taken(self, call: _Call, outcomes: list[Any]) -> None:
        self._on_wrote()
        if len(self._known) > self._sweep_above:
            self._sweep(call.at)
        for one, end in zip(call.appends, outcomes, strict=True):
            if end < one.first - 1 or one.ends:  # a refusal, a gap, or over
                self._known.pop(one.stream, None)
            else:
                before = self._known.get(one.stream, _UNKNOWN)
                expires_at = call.at + one.ttl_ms / 1000 if before.needs_renewal(one, call.at) else before.expires_at
                self._known[one.stream] = _Known(one.trim_to, expires_at)
        call.on_taken([_REFUSALS.get(end, end) for end in outcomes])

    def _sweep(self, now: float) -> None:
        """Forgets the streams whose keys have expired: most that were given up get no end over this connection."""
        self._known = {stream: known for stream, known in self._known.items() if known.expires_at > now}
        self._sweep_above = max(_SWEEP_ABOVE, 2 * len(self._known))

    def _fail(self, call: _Call, error: Exception) -> None:
        for one in call.appends:
            self._known.pop(one.stream, None)
        super()._fail(call, error)
