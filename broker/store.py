"""The store: the part of Redis that we use, as an interface with two implementations (`redis/store.py`, `memory/store.py`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from .errors import StoreUnavailable
from .job_store import JobStore
from .result_files import ResultFiles
from .store_keys import STREAM_TTL_S

T = TypeVar("T")

WRONG_TYPE = b"\0WRONGTYPE"
"""The value that a read returns for a key of another Redis type. It parses as no document of ours, so it is treated like a broken one.
The scripts know it too, so that it can be replaced."""

# (key, value): a write happens only if the key holds this value (`None`: no value), checked in the same step
Guard = tuple[str, bytes | None]


class Record(msgspec.Struct, frozen=True):
    """A result to write once (NX), with the inbox entry for the process that waits for it (an empty `inbox`: nobody waits)."""

    key: str
    value: bytes
    inbox: str
    note: bytes
    deadline_ms: int  # store time; until then the write is tried again
    ttl_ms: int = 0  # 0: RESULT_TTL_S


OnRecorded = Callable[[bool | Exception], None]
"""Called once with the outcome of a record, see `Store.record`; with StoreClosed if the store is closed first. It must not raise."""


class Append(msgspec.Struct, frozen=True):
    """Frames of one stream to append, and perhaps its end. It is written only if `owner` holds `claim` (or nothing: then it is set) and
    `future` holds no result.

    `frames` are numbered from `first`; those that the stream has already are passed over. `trim_to` removes the frames up to that number,
    0 none. `ends` is the result, recorded behind the frames. Every inbox gets an entry for each frame (`note_of` it) and, behind them,
    `end_note`.

    Nothing is written behind a gap: if the store has lost frames before `first` that `trim_to` does not give up, the outcome says where the
    stream ends.
    """

    id: str

    stream: str
    owner: str
    future: str
    claim: bytes
    attempt: int
    first: int
    frames: tuple[bytes, ...] = ()
    inboxes: tuple[str, ...] = ()
    trim_to: int = 0
    ends: bytes = b""
    end_note: bytes = b""
    ttl_ms: int = STREAM_TTL_S * 1000


class Refusal(Enum):
    """Why the store took nothing of an Append."""

    ENDED = "ended"  # a result stands there
    TAKEN = "taken"  # another run owns the stream


OnAppended = Callable[[int | Refusal | Exception], None]
"""Called once with the outcome of an Append: the number of the last frame that the stream has now. If that is lower than `first - 1`, the
store has lost frames, and nothing was written: the frames from the next number on have to be appended again, or be given up by `trim_to`.
It must not raise."""


class Place(NamedTuple):
    """Where an entry of a stream stands."""

    attempt: int
    seq: int


class StoreClosed(StoreUnavailable):
    """This process closed its store before the write."""


class Health(Protocol):
    """What one process knows of its store, from its own calls."""

    @property
    def connected(self) -> bool: ...

    @property
    def trouble(self) -> str:
        """Why no result can be recorded now, in words fit for strangers; empty while one can."""
        ...

    @property
    def refusal(self) -> str:
        """Why the store answers but takes no writes (one case of `trouble`); also empty if this process has written nothing lately."""
        ...

    @property
    def refused_since(self) -> float:
        """Monotonic time since when every write of this process was refused; infinite if the last one was taken."""
        ...

    @property
    def written_at(self) -> float:
        """Monotonic time of this process's last successful write."""
        ...

    def took_a_write(self) -> None:
        """Notes that another process's write succeeded: earlier refusals of ours say nothing any more."""
        ...

    @property
    def noted(self) -> str:
        """A sentence for operators about keys that had another Redis type lately; empty if none had."""
        ...


class Store(Protocol):
    """One process's access to the store. Every call ends within our own budget, with StoreUnavailable if need be."""

    @property
    def health(self) -> Health: ...

    @property
    def jobs(self) -> JobStore:
        """What is kept of jobs."""
        ...

    @property
    def files(self) -> ResultFiles:
        """Where large results of jobs are kept."""
        ...

    def now_ms(self) -> int:
        """Store time, from the last offset measured; it goes on while the store is away."""
        ...

    def record(self, record: Record) -> asyncio.Future[bool]:
        """Writes the result with the others of this loop turn. The future is True if this is the first result (or equal to the first),
        False if another result stood there first.

        It fails with StoreUnavailable when the store stays away past the record's deadline. When the store is closed, it is cancelled.
        """
        ...

    def record_then(self, record: Record, on_recorded: OnRecorded) -> None:
        """Does the same without a future, for what every request needs. `on_recorded` may be called at once."""
        ...

    def mark(self, key: str, value: bytes, ttl_ms: int) -> None:
        """Sets a marker with the next batch of results. Nobody waits for it, and it may be lost."""
        ...

    def drop_soon(self, key: str) -> None:
        """Deletes a key with the next batch of results. Nobody waits for it, and it may be lost: the key has a TTL of its own."""
        ...

    def append_then(self, append: Append, on_appended: OnAppended) -> None:
        """Appends frames with those of the other streams of this loop turn. There is at most one Append with frames under way
        for a stream. The outcome is StoreUnavailable after one budget of time: the caller repeats it. The store pauses between calls that
        fail, so it may do that at once. `on_appended` may be called at once."""
        ...

    async def read_stream(self, key: str, after: Place, count: int = 64) -> list[tuple[Place, bytes]]:
        """Returns up to `count` entries behind `after`, in order; none for an absent key."""
        ...

    async def last_of_stream(self, key: str) -> int:
        """Returns the number of the last frame that was ever appended; 0 for an absent key."""
        ...

    def post(self, key: str, entry: bytes) -> None:
        """Appends to a list that one process reads by `read_inbox`, with the next batch of results. Nobody waits for it, and it may be
        lost."""
        ...

    async def get(self, key: str) -> bytes | None:
        """Returns the value; WRONG_TYPE for a key of another type, as `get_large` and `get_documents` do."""
        ...

    async def get_large(self, key: str) -> bytes | None:
        """Reads a value that may take longer to transfer: a body by reference, or code."""
        ...

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Reads all keys in one step. A key of another type reads as None here."""
        ...

    async def get_documents(self, keys: Sequence[str]) -> list[bytes | None]:
        """Reads a few keys in one step."""
        ...

    async def set(self, key: str, value: bytes, *, ttl_ms: int | None = None, only_new: bool = False) -> bool:
        """Writes the value; returns whether it stands there now. That is False only with `only_new` (SET NX) where another value stood. A
        writer that must know whether it was the one has to write a unique value."""
        ...

    async def put_if_absent(self, key: str, value: bytes, *, ttl_ms: int) -> None:
        """SET NX; if the key exists, only extend its TTL. For a key that can have only one value."""
        ...

    async def replace(
        self, key: str, old: bytes | None, new: bytes | None, *, ttl_ms: int = 0, guard: Guard | None = None, quiet: bool = False
    ) -> bool:
        """Compare and set (`None`: absent). Returns whether the key held `old` and the guard held, so that the key now holds `new`, for
        `ttl_ms` or without expiry.

        Wakes the watchers of documents, unless `quiet`.
        """
        ...

    async def increment(self, key: str, ttl_ms: int) -> int:
        """Adds one, and returns the new count."""
        ...

    async def delete(self, *keys: str, guard: Guard | None = None) -> bool:
        """Deletes all keys in one step, so that no reader sees only some of them gone. Returns False only if the guard does not hold."""
        ...

    async def expire(self, keys: Sequence[str], ttl_ms: int | None) -> None:
        """Sets the TTL of the keys, or removes it (None). Absent keys stay absent."""
        ...

    async def extend(self, keys: Sequence[str], ttl_ms: int) -> frozenset[str]:
        """Extends TTLs below `ttl_ms` to it, and returns the absent keys. It reads no value, since a client may only write code."""
        ...

    async def put_field(self, key: str, field: str, value: bytes) -> None: ...

    async def drop_fields(self, key: str, *fields: str) -> None: ...

    async def fields(self, key: str) -> dict[str, bytes]:
        """Raises WrongType."""
        ...

    async def take_away(self, key: str) -> None:
        """Deletes a key of another type; members then write theirs anew."""
        ...

    async def probe(self) -> None:
        """Writes a key that expires at once. Raises StoreUnavailable, with the reason, if that is refused."""
        ...

    def watch(self) -> asyncio.Event:
        """Returns a new event, which is set whenever a document may have changed, and after every reconnect."""
        ...

    def unwatch(self, event: asyncio.Event) -> None: ...

    async def announce(self) -> None:
        """Wakes all watchers, in every process."""
        ...

    async def read_inbox(self, inbox: str, on_notes: Callable[[list[bytes]], None], on_gap: Callable[[], None]) -> None:
        """Runs until cancelled: passes on entries as they arrive, and calls `on_gap` whenever some may have been missed."""
        ...

    async def append_log(self, key: str, *entries: bytes) -> None:
        """Appends to a log that every process reads. It keeps the last LOG_LENGTH entries, for as long as a request may live."""
        ...

    async def read_log(self, key: str, on_entries: Callable[[list[bytes]], None]) -> None:
        """Runs until cancelled: passes on the entries that the log holds, and then those appended."""
        ...

    async def fullness(self, *, was_full: bool) -> str:
        """Why the store should be given no new jobs, in words fit for strangers: it is almost full, or was and has not much room yet. Empty
        while it may, or if it refuses the question."""
        ...

    async def misconfiguration(self) -> str:
        """Which setting of the server breaks our promises, with the mend; empty if none does, or if it refuses the question."""
        ...

    async def close(self) -> None: ...


def recorded(record_then: Callable[[T, OnRecorded], None], record: T) -> asyncio.Future[bool]:
    """Returns `Store.record` in terms of `Store.record_then`, or what `JobStore.end_then` tells."""
    done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def on_recorded(outcome: bool | Exception) -> None:
        if done.done():  # its reader was cancelled
            return
        if isinstance(outcome, StoreClosed):
            done.cancel()
        elif isinstance(outcome, Exception):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)

    record_then(record, on_recorded)
    return done
