"""Nodes whose beat is missing. Either the node left, or all beats were lost and will be written again within a second."""

from __future__ import annotations

import time
from collections.abc import Mapping

from .state.beats import Beat, MemberState, NodeBeat

ABSENT_FOR_S = 2.5


class AbsentNodes:
    """A leader's memory of the nodes. A node whose beat is missing counts for ABSENT_FOR_S more, unless it was draining: otherwise a
    beats hash that another program deleted would cost every replica."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Beat, float]] = {}  # field -> (last beat, monotonic time when it was read)

    def __repr__(self) -> str:
        return f"<AbsentNodes among {list(self._seen)}>"

    def added_to(self, beats: Mapping[str, Beat]) -> dict[str, Beat]:
        """Returns the beats plus those of nodes that went missing less than ABSENT_FOR_S ago."""
        now = time.monotonic()
        self._seen |= {field: (beat, now) for field, beat in beats.items() if isinstance(beat, NodeBeat)}
        self._seen = {field: seen for field, seen in self._seen.items() if now - seen[1] < ABSENT_FOR_S}
        return {**{field: beat for field, (beat, _) in self._seen.items() if beat.state is not MemberState.DRAINING}, **beats}
