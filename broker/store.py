"""The store: what Redis does for us, as an interface with two implementations (`redis/store.py`, `memory/store.py`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

WRONG_TYPE = b"\0WRONGTYPE"
"""What a key reads as that holds a value of another type: no document of ours, so it is treated as one that does not parse. The scripts
know it too, so that it can be replaced."""

Guard = tuple[str, bytes | None]  # what must stand at a key (`None`: nothing) for a write to happen, in the same step


@dataclass(frozen=True, slots=True)
class Record:
    """A result to be written once, with the note for the process that waits for it (`inbox` empty: nobody)."""

    key: str
    value: bytes
    inbox: str
    note: bytes
    deadline_ms: int  # store time; until then the write is tried again


class Store(Protocol):
    """One process's way to the store. Every call ends within our own budget, in StoreUnavailable if need be."""

    @property
    def connected(self) -> bool: ...

    @property
    def trouble(self) -> str:
        """Why nothing can be recorded now, in words for anybody; empty while all is well."""
        ...

    @property
    def refusal(self) -> str:
        """Of `trouble`, why it takes no writes though it answers; empty as well where this process has written nothing lately."""
        ...

    @property
    def refused_since(self) -> float:
        """Monotonic: since when every write of this process was refused; infinite where the last one was taken."""
        ...

    @property
    def written_at(self) -> float:
        """Monotonic: when this process's last write was taken."""
        ...

    def took_a_write(self) -> None:
        """Another process's write was seen to be taken: what was refused of ours before says nothing any more."""
        ...

    @property
    def noted(self) -> str:
        """Which keys were of another type lately, for operators; empty where none was."""
        ...

    def now_ms(self) -> int:
        """Store time, from the last offset measured; it goes on while the store is away."""
        ...

    def record(self, record: Record) -> asyncio.Future[bool]:
        """Written with the others of this loop turn: True when ours is the first result (or the same as the first), False when another
        one stood there already.

        The future fails with StoreUnavailable when the store stays away past the record's deadline.
        """
        ...

    def mark(self, key: str, value: bytes, ttl_ms: int) -> None:
        """Sets a marker with the next write of results; nobody waits for it and it may be lost."""
        ...

    def drop_soon(self, key: str) -> None:
        """Deletes a key with the next write of results; nobody waits for it and it may be lost: the key has an expiry of its own."""
        ...

    async def get(self, key: str) -> bytes | None:
        """WRONG_TYPE where a value of another type stands; so do `get_large` and `get_documents`."""
        ...

    async def get_large(self, key: str) -> bytes | None:
        """Of what may take longer than a moment to arrive: a body that travels by reference, or code."""
        ...

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """At once; a value of another type is None here."""
        ...

    async def get_documents(self, keys: Sequence[str]) -> list[bytes | None]:
        """At once, of few keys."""
        ...

    async def set(self, key: str, value: bytes, *, ttl_ms: int | None = None, only_new: bool = False) -> bool:
        """Whether it stands there now: False only with `only_new`, where another value did. So a value that is to be told from somebody
        else's has to be like no other."""
        ...

    async def put_if_absent(self, key: str, value: bytes, *, ttl_ms: int) -> None:
        """Writes it where nothing stands, else puts the expiry of what does off: for a key that can have one value only."""
        ...

    async def replace(
        self, key: str, old: bytes | None, new: bytes | None, *, ttl_ms: int = 0, guard: Guard | None = None, quiet: bool = False
    ) -> bool:
        """Compare and set (`None`: absent): whether `old` stood there, and the guard's value at its key, and `new` does now; for `ttl_ms`,
        or for ever.

        Watchers of the document are woken, unless it is done quietly.
        """
        ...

    async def increment(self, key: str, ttl_ms: int) -> int:
        """The counter after adding one."""
        ...

    async def delete(self, *keys: str, guard: Guard | None = None) -> bool:
        """All at once: nobody sees some of them gone and others not. False only where the guard's value does not stand at its key."""
        ...

    async def expire(self, keys: Sequence[str], ttl_ms: int | None) -> None:
        """From now on the values have so long, or for ever; nothing where there is none."""
        ...

    async def extend(self, keys: Sequence[str], ttl_ms: int) -> frozenset[str]:
        """The values have at least so long from now on. Returns the keys without one. Reads no value: a client may write code only."""
        ...

    async def put_field(self, key: str, field: str, value: bytes) -> None: ...

    async def drop_fields(self, key: str, *fields: str) -> None: ...

    async def fields(self, key: str) -> dict[str, bytes]:
        """Raises WrongType."""
        ...

    async def take_away(self, key: str) -> None:
        """A value of another type, where members write theirs anew."""
        ...

    async def probe(self) -> None:
        """Writes something that is gone at once. Raises StoreUnavailable with the reason where that is refused."""
        ...

    def watch(self) -> asyncio.Event:
        """An event of the caller's own, set whenever a document may have changed, and after every reconnect."""
        ...

    def unwatch(self, event: asyncio.Event) -> None: ...

    async def announce(self) -> None:
        """Wakes all watchers, in every process."""
        ...

    async def read_inbox(self, inbox: str, on_notes: Callable[[list[bytes]], None], on_gap: Callable[[], None]) -> None:
        """Runs until cancelled: hands over what arrives, and calls `on_gap` whenever something may have been missed."""
        ...

    async def append_log(self, key: str, *entries: bytes) -> None:
        """To a log that every process reads; its last LOG_LENGTH entries are kept, for as long as a request may live."""
        ...

    async def read_log(self, key: str, on_entries: Callable[[list[bytes]], None]) -> None:
        """Runs until cancelled: hands over what is kept of the log, and then what is appended."""
        ...

    async def misconfiguration(self) -> str:
        """What about the server's own set-up breaks our promises, and the mend; empty where nothing does, or it does not let us ask."""
        ...

    async def close(self) -> None: ...
