"""Streamed answers in memory."""

from __future__ import annotations

from ..store import Append, Place, Refusal
from ..streams import note_of


class Stream:
    """The frames of one answer."""

    def __init__(self) -> None:
        self.last = 0
        self._entries: list[tuple[Place, bytes]] = []

    def __repr__(self) -> str:
        return f"<Stream up to {self.last}, {len(self._entries)} kept>"

    def append(self, append: Append) -> int:
        """Returns the number of the last frame, or of the one before a gap; see `OnAppended`."""
        before = max(self.last, append.trim_to)
        if before < append.first - 1:
            return before
        self.last = before
        for seq, frame in enumerate(append.frames, append.first):
            if seq > self.last:
                self._entries.append((Place(append.attempt, seq), frame))
                self.last = seq
        if append.trim_to:
            self._entries = [entry for entry in self._entries if entry[0].seq > append.trim_to]
        return self.last

    def behind(self, after: Place, count: int) -> list[tuple[Place, bytes]]:
        return [entry for entry in self._entries if entry[0] > after][:count]


def refusal(append: Append, owner: bytes | None, result: bytes | None) -> Refusal | None:
    """Why nothing of it may be written. An end that stands there already is our own, of a call that was repeated."""
    if result is not None:
        return None if append.ends and result == append.ends else Refusal.ENDED
    return Refusal.TAKEN if owner is not None and owner != append.claim else None


def notes_of(append: Append) -> list[bytes]:
    """What each inbox is told."""
    notes = [note_of(append.id, seq, frame) for seq, frame in enumerate(append.frames, append.first)]
    return [*notes, append.end_note] if append.ends else notes
