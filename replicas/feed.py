"""The feed of a replica: the list by which readers of its streams send credit, and proxies what the clients of its sessions send.

It is read over a connection of its own, while there is a stream or a session, and for a moment after.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from ..broker.backoff import keep_running
from ..broker.results import SESSION_KIND, InboxEntry, read_entry
from ..broker.store import Store
from ..broker.streams import Credit, read_credit

_READS_ON_S = 5.0  # so that one stream a second needs no new connection each


class Feed:
    """The one reader of the list at `key`. `on_credit` and `on_session` get what it says."""

    def __init__(self, store: Store, key: str) -> None:
        self.key = key
        self._store = store
        self.on_credit: Callable[[Credit], None] = lambda credit: None
        self.on_session: Callable[[InboxEntry], None] = lambda entry: None
        self._needed_by: set[object] = set()
        self._is_read = False
        self._then: list[Callable[[], None]] = []
        self._reading: asyncio.Task[None] | None = None
        self._stopping: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Feed {self.key}, {'not ' if self._reading is None else ''}read>"

    def need(self, whom: object) -> None:
        """Reads until nobody needs it any more."""
        self._needed_by.add(whom)
        if self._stopping is not None:
            self._stopping.cancel()
            self._stopping = None
        if self._reading is None:
            read = partial(self._store.read_inbox, self.key, self._on_entries, self._begins)
            self._reading = asyncio.create_task(keep_running("the reader of the feed", read))

    def when_read(self, then: Callable[[], None]) -> None:
        """Calls `then` at once, or as soon as the reading has begun. Before that the store in memory takes no entries."""
        if self._is_read:
            then()
        else:
            self._then.append(then)

    def leave(self, whom: object) -> None:
        self._needed_by.discard(whom)
        if not self._needed_by and self._reading is not None and self._stopping is None:
            self._stopping = asyncio.get_running_loop().call_later(_READS_ON_S, self.close)

    def close(self) -> None:
        if self._stopping is not None:
            self._stopping.cancel()
        if self._reading is not None:
            self._reading.cancel()
        self._stopping = self._reading = None
        self._is_read = False

    def _begins(self) -> None:
        self._is_read = True
        waiting, self._then = self._then, []
        for then in waiting:
            then()

    def _on_entries(self, entries: list[bytes]) -> None:
        for raw in entries:
            if (entry := read_entry(raw)) is not None and entry.kind == SESSION_KIND:
                self.on_session(entry)
            elif (credit := read_credit(raw)) is not None:
                self.on_credit(credit)
