"""Streamed answers in memory."""

from __future__ import annotations

from bisect import bisect_right

from ..store import Append, Place, Refusal
from ..streams import note_of

_Entry = tuple[Place, bytes]


class Stream:
    """The frames of one answer."""

    def __init__(self) -> None:
        self.last = 0
        self._attempt = 0  # of that frame
        self._entries: list[_Entry] = []  # places and numbers rise

    def __repr__(self) -> str:
        return f"<Stream up to {self.last}, {len(self._entries)} kept>"

    def append(self, append: Append) -> int:
        """Returns the number of the last frame; one below `first - 1` means a gap, and nothing written."""
        before = append.first - 1
        if max(self.last, append.trim_to) < before:
            return max(self.last, append.trim_to)
        for seq, frame in enumerate(append.frames, append.first):
            if seq > self.last:
                self.last, self._attempt = seq, max(append.attempt, self._attempt)
                self._entries.append((Place(self._attempt, seq), frame))
        del self._entries[: bisect_right(self._entries, append.trim_to, key=_seq)]
        return max(self.last, append.trim_to, before + len(append.frames))

    def behind(self, after: Place, count: int) -> list[_Entry]:
        start = bisect_right(self._entries, after, key=_place)
        return self._entries[start : start + count]


def refusal(append: Append, owner: bytes | None, result: bytes | None) -> Refusal | None:
    """Why nothing of it may be written."""
    if result is not None:
        return Refusal.ENDED
    return Refusal.TAKEN if owner is not None and owner != append.claim else None


def notes_of(append: Append) -> list[bytes]:
    """What each inbox is told."""
    notes = [note_of(append.id, seq, frame) for seq, frame in enumerate(append.frames, append.first)]
    return [*notes, append.end_note] if append.ends else notes


def _place(entry: _Entry) -> Place:
    return entry[0]


def _seq(entry: _Entry) -> int:
    return entry[0].seq
