"""Nodes whose beat is not there: each of them left, or all beats were lost and come again within a second."""

from __future__ import annotations

import time
from collections.abc import Mapping

from .state.beats import Beat, MemberState, NodeBeat

ABSENT_FOR_S = 2.5


class AbsentNodes:
    """What one leader remembers of the nodes. A node counts for a moment after its beat was there last, unless it drained: else a hash that
    another program deleted would cost every replica."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Beat, float]] = {}  # by field: the last beat, and when it was read (monotonic)

    def __repr__(self) -> str:
        return f"<AbsentNodes among {list(self._seen)}>"

    def added_to(self, beats: Mapping[str, Beat]) -> dict[str, Beat]:
        """The beats, and those that are missing among them for no longer than that."""
        now = time.monotonic()
        self._seen |= {field: (beat, now) for field, beat in beats.items() if isinstance(beat, NodeBeat)}
        self._seen = {field: seen for field, seen in self._seen.items() if now - seen[1] < ABSENT_FOR_S}
        return {**{field: beat for field, (beat, _) in self._seen.items() if beat.state is not MemberState.DRAINING}, **beats}
