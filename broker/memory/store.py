"""The store in memory, on one event loop. It keeps the same promises as far as one process can."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence

from ..result_files import NO_FILES, ResultFiles
from ..store import Append, Guard, OnAppended, OnRecorded, Place, Record, recorded
from ..store_keys import LOG_LENGTH, RESULT_TTL_S, StoreKeys
from .expiring import Expiring
from .jobs import EmbeddedJobs
from .streams import Stream, notes_of, refusal


class AlwaysWell:
    """Implements `Health`, of a store that is this process's own memory."""

    @property
    def connected(self) -> bool:
        return True

    @property
    def trouble(self) -> str:
        return ""

    @property
    def refusal(self) -> str:
        return ""

    @property
    def refused_since(self) -> float:
        return math.inf

    @property
    def written_at(self) -> float:
        return time.monotonic()

    def took_a_write(self) -> None:
        """Does nothing: this store takes every write."""

    @property
    def noted(self) -> str:
        return ""


class EmbeddedStore:
    """Implements `Store`. The namespace is that of its jobs' results, whose keys it makes itself."""

    def __init__(self, namespace: str = "mqserve", files: ResultFiles = NO_FILES) -> None:
        self.files = files
        self._epoch = time.time() - time.monotonic()  # read once: a step of the wall clock must not move deadlines
        self._values = Expiring[bytes]()
        self._hashes: dict[str, dict[str, bytes]] = {}
        self._readers: dict[str, Callable[[list[bytes]], None]] = {}
        self._posts: dict[str, list[bytes]] = {}  # of this loop turn, by list
        self._streams = Expiring[Stream]()
        self._logs: dict[str, deque[bytes]] = {}
        self._log_readers: dict[str, list[Callable[[list[bytes]], None]]] = {}
        self._watchers: set[asyncio.Event] = set()
        self.health = AlwaysWell()
        keys = StoreKeys(namespace)
        self.jobs = EmbeddedJobs(keys, self._values, self.post, self.now_ms, lambda: self._wake_readers(keys.ends))

    def __repr__(self) -> str:
        return f"<EmbeddedStore {len(self._values)} keys>"

    def now_ms(self) -> int:
        return int((self._epoch + time.monotonic()) * 1000)

    def record(self, record: Record) -> asyncio.Future[bool]:
        return recorded(self.record_then, record)

    def record_then(self, record: Record, on_recorded: OnRecorded) -> None:
        fresh = self._values.put(record.key, record.value, record.ttl_ms or RESULT_TTL_S * 1000, only_new=True)
        fresh = fresh or self._values.get(record.key) == record.value
        if fresh and (reader := self._readers.get(record.inbox)):
            reader([record.note])
        on_recorded(fresh)

    def append_then(self, append: Append, on_appended: OnAppended) -> None:
        result = self._values.get(append.future)
        if result is not None and result == append.ends:  # our own, or equal
            self._tell_readers(append)
            return on_appended(append.first - 1 + len(append.frames))
        if refused := refusal(append, self._values.get(append.owner), result):
            return on_appended(refused)
        stream = self._streams.get(append.stream) or Stream()
        if (last := stream.append(append)) >= append.first - 1:
            self._values.put(append.owner, append.claim, append.ttl_ms)
            self._streams.put(append.stream, stream, append.ttl_ms)
            if append.ends:
                self._values.put(append.future, append.ends, RESULT_TTL_S * 1000, only_new=True)
            self._tell_readers(append)
        on_appended(last)

    def _tell_readers(self, append: Append) -> None:
        if notes := notes_of(append):
            for inbox in append.inboxes:
                self._post_all(inbox, notes)

    async def read_stream(self, key: str, after: Place, count: int = 64) -> list[tuple[Place, bytes]]:
        stream = self._streams.get(key)
        return [] if stream is None else stream.behind(after, count)

    async def last_of_stream(self, key: str) -> int:
        stream = self._streams.get(key)
        return 0 if stream is None else stream.last

    def post(self, key: str, entry: bytes) -> None:
        """Posts at the end of this loop turn: readers answer posts by posts, and would call each other ever deeper."""
        if not self._posts:
            asyncio.get_running_loop().call_soon(self._deliver_posts)
        self._posts.setdefault(key, []).append(entry)

    def _deliver_posts(self) -> None:
        posts, self._posts = self._posts, {}
        for key, entries in posts.items():
            self._post_all(key, entries)

    def _post_all(self, key: str, entries: list[bytes]) -> None:
        if reader := self._readers.get(key):
            reader(entries)

    def mark(self, key: str, value: bytes, ttl_ms: int) -> None:
        self._values.put(key, value, ttl_ms)

    def drop_soon(self, key: str) -> None:
        self._values.pop(key)
        self._streams.pop(key)

    async def get(self, key: str) -> bytes | None:
        return self._values.get(key)

    async def get_large(self, key: str) -> bytes | None:
        return self._values.get(key)

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        return [self._values.get(key) for key in keys]

    async def get_documents(self, keys: Sequence[str]) -> list[bytes | None]:
        return [self._values.get(key) for key in keys]

    async def set(self, key: str, value: bytes, *, ttl_ms: int | None = None, only_new: bool = False) -> bool:
        return self._values.put(key, value, ttl_ms, only_new=only_new) or self._values.get(key) == value

    async def put_if_absent(self, key: str, value: bytes, *, ttl_ms: int) -> None:
        if not self._values.put(key, value, ttl_ms, only_new=True):
            self._values.extend(key, ttl_ms)

    async def replace(
        self, key: str, old: bytes | None, new: bytes | None, *, ttl_ms: int = 0, guard: Guard | None = None, quiet: bool = False
    ) -> bool:
        if self._values.get(key) != old or not self._holds(guard):
            return False
        if new is None:
            self._values.pop(key)
        else:
            self._values.put(key, new, ttl_ms or None)
        if not quiet:
            await self.announce()
        return True

    async def increment(self, key: str, ttl_ms: int) -> int:
        count = int(self._values.get(key) or 0) + 1
        self._values.put(key, str(count).encode(), ttl_ms)
        return count

    async def delete(self, *keys: str, guard: Guard | None = None) -> bool:
        if not self._holds(guard):
            return False
        for key in keys:
            self._values.pop(key)
            self._hashes.pop(key, None)
            self._streams.pop(key)
        return True

    async def expire(self, keys: Sequence[str], ttl_ms: int | None) -> None:
        for key in keys:
            self._values.expire(key, ttl_ms)

    async def extend(self, keys: Sequence[str], ttl_ms: int) -> frozenset[str]:
        return frozenset([key for key in keys if not self._values.extend(key, ttl_ms)])

    async def put_field(self, key: str, field: str, value: bytes) -> None:
        self._hashes.setdefault(key, {})[field] = value

    async def drop_fields(self, key: str, *fields: str) -> None:
        for field in fields:
            self._hashes.get(key, {}).pop(field, None)

    async def fields(self, key: str) -> dict[str, bytes]:
        return dict(self._hashes.get(key, {}))

    async def take_away(self, key: str) -> None:
        await self.delete(key)

    async def probe(self) -> None:
        """Does nothing: this store takes every write."""

    def watch(self) -> asyncio.Event:
        event = asyncio.Event()
        self._watchers.add(event)
        return event

    def unwatch(self, event: asyncio.Event) -> None:
        self._watchers.discard(event)

    async def announce(self) -> None:
        for event in self._watchers:
            event.set()

    async def read_inbox(self, inbox: str, on_notes: Callable[[list[bytes]], None], on_gap: Callable[[], None]) -> None:
        self._readers[inbox] = on_notes
        on_gap()
        try:
            await asyncio.get_running_loop().create_future()  # until cancelled: `record_then` calls the reader itself
        finally:
            del self._readers[inbox]

    async def append_log(self, key: str, *entries: bytes) -> None:
        log = self._logs.setdefault(key, deque(maxlen=LOG_LENGTH))
        log.extend(entries)
        for reader in self._log_readers.get(key, ()):
            reader(list(entries))

    async def read_log(self, key: str, on_entries: Callable[[list[bytes]], None]) -> None:
        on_entries(list(self._logs.get(key, ())))
        readers = self._log_readers.setdefault(key, [])
        readers.append(on_entries)
        try:
            await asyncio.get_running_loop().create_future()  # until cancelled: `append_log` calls the readers itself
        finally:
            readers.remove(on_entries)

    def _wake_readers(self, key: str) -> None:
        """For a log that others write: its readers only learn that there is more."""
        for on_entries in self._log_readers.get(key, ()):
            on_entries([])

    async def fullness(self, *, was_full: bool) -> str:
        return ""

    async def misconfiguration(self) -> str:
        return ""

    async def close(self) -> None:
        self._values.clear()
        self._hashes.clear()
        self._streams.clear()
        self.jobs.clear()

    def _holds(self, guard: Guard | None) -> bool:
        return guard is None or self._values.get(guard[0]) == guard[1]
