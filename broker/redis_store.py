"""The store on Redis 7: results in one script call per flush, one blocking reader, budgets of our own on every call.

redis-py's defaults suit no request: one GET on a frozen server takes 58.9 s. Commands get one connection pool with short
timeouts; the blocking reader and the subscription get clients of their own.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from .backoff import delays
from .errors import StoreUnavailable, words_of
from .refusals import ExplainedRedis, store_refusal
from .settings import masked
from .store import Guard, Record
from .store_keys import INBOX_TTL_S, LOG_LENGTH, LOG_TTL_S, RESULT_TTL_S, StoreKeys

logger = logging.getLogger(__name__)

CONNECT_BUDGET_S = 5.0
CALL_BUDGET_S = 3.0
BLOCK_S = 5.0
RECONNECT_S = 2.9  # a little less than CALL_BUDGET_S: of a server that hangs, the first call that fails says so
INBOX_BATCH = 256
FLUSH_BATCH = 128
FLUSH_BYTES = 4 * 1024 * 1024  # or one large result: a call that takes longer than its budget is sent again and again
LARGE_BYTES = 1024 * 1024
LARGE_BUDGET_S = 30.0  # for what has more: bodies that travel by reference, and code. Whoever waits for it has a deadline of his own
LOG_BATCH = 1000
_CLOCK_EVERY_S = 30.0
_CLOCK_TRIES = 3  # at the beginning, for a sample that is as good as _CLOCK_GOOD_S
_CLOCK_GOOD_S = 0.05
_CLOCK_DRIFT = 0.001  # what two clocks may differ in a second; they differ by less
_HERE = Path(__file__).parent
_FAILURES = (RedisError, OSError, TimeoutError, RuntimeError)  # the last is uvloop's, of a write to a connection that was just lost
T = TypeVar("T")


class _Pool(redis.BlockingConnectionPool):
    """The last connection given back is the next one used: where that is one that could not be opened, since the server takes no more, an
    open one beneath it would never be used again. So it goes to the bottom."""

    async def release(self, connection: Any) -> None:
        await super().release(connection)
        kept = self._available_connections
        if kept and kept[-1] is connection and not connection.is_connected:
            kept.insert(0, kept.pop())


@asynccontextmanager
async def open_redis(url: str, namespace: str) -> AsyncIterator[RedisStore]:
    """Connected on entry, or StoreUnavailable within CONNECT_BUDGET_S; closed on exit."""
    store = RedisStore(url, namespace)
    try:
        await store.connect()
        yield store
    finally:
        await store.close()


class RedisStore:
    """Implements `Store`; made by `open_redis`."""

    def __init__(self, url: str, namespace: str) -> None:
        self._url = url
        self._channel = StoreKeys(namespace).changed
        once = Retry(NoBackoff(), 1)
        self._commands = ExplainedRedis.from_pool(
            _Pool.from_url(url, max_connections=16, timeout=2, socket_timeout=2, socket_connect_timeout=2, retry=once)
        )
        never = Retry(NoBackoff(), 0)
        patient = {"timeout": LARGE_BUDGET_S, "socket_timeout": LARGE_BUDGET_S, "socket_connect_timeout": 2}
        self._large = ExplainedRedis.from_pool(_Pool.from_url(url, max_connections=8, retry=never, **patient))
        self._blocking = ExplainedRedis.from_url(url, socket_timeout=None, socket_connect_timeout=2, retry=never)
        self._scripts = {name: (_HERE / f"{name}.lua").read_text() for name in ("record", "replace", "delete")}
        self._digests: dict[str, str] = {}
        self._offset_ms = 0.0
        self._offset_error_s = math.inf  # at most, when it was measured
        self._offset_measured_at = 0.0  # monotonic
        self._down_since = -math.inf  # monotonic; inf while it answers
        self._buffer: list[tuple[Record, asyncio.Future[bool]]] = []
        self._marks: list[tuple[str, bytes, int]] = []  # key, value, TTL in ms; a TTL of 0: the key goes
        self._flusher: asyncio.Task[None] | None = None
        self._watchers: set[asyncio.Event] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<RedisStore {masked(self._url)}, {'up' if self.connected else 'down'}, {len(self._buffer)} to write>"

    async def connect(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_BUDGET_S):
                for name, text in self._scripts.items():
                    self._digests[name] = await self._commands.script_load(text)
                for _ in range(_CLOCK_TRIES):
                    if self._offset_error_s > _CLOCK_GOOD_S:
                        await self._measure_clock()
        except _FAILURES as error:
            raise StoreUnavailable(
                store_refusal(error, self._url)
                or f"no connection to Redis at {masked(self._url)} within {CONNECT_BUDGET_S:g} s ({words_of(error)}); "
                "is it running, and is MQSERVE_STORE_URL right?"
            ) from error
        self._down_since = math.inf
        self._tasks.append(asyncio.create_task(self._keep_clock(), name="keep the store's clock"))

    @property
    def connected(self) -> bool:
        """Not once it has been away for longer than a lost connection takes to come back."""
        return time.monotonic() - self._down_since < RECONNECT_S

    def now_ms(self) -> int:
        return int(time.monotonic() * 1000 + self._offset_ms)

    # Results: collected in this turn, written by one script call.

    def record(self, record: Record) -> asyncio.Future[bool]:
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._buffer.append((record, done))
        self._flush_soon()
        return done

    def mark(self, key: str, value: bytes, ttl_ms: int) -> None:
        self._marks.append((key, value, max(1, ttl_ms)))
        self._flush_soon()

    def drop_soon(self, key: str) -> None:
        self._marks.append((key, b"", 0))
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush(), name="write results")

    async def _flush(self) -> None:
        """Until nothing is left: what gathers while one call is under way rides in the next."""
        pauses = delays(first_s=0.02, cap_s=1.0)
        while self._buffer or self._marks:
            batch = self._next_batch()
            try:
                await self._write_marks()
                if batch:
                    self._tell(batch, await self._write(batch))
                pauses = delays(first_s=0.02, cap_s=1.0)
            except StoreUnavailable as error:
                self._buffer = self._give_up_late(batch, error) + self._buffer
                await asyncio.sleep(next(pauses))

    def _next_batch(self) -> list[tuple[Record, asyncio.Future[bool]]]:
        count = size = 0
        for record, _ in self._buffer[:FLUSH_BATCH]:
            size += len(record.value) + len(record.note)
            if count and size > FLUSH_BYTES:
                break
            count += 1
        batch, self._buffer = self._buffer[:count], self._buffer[count:]
        return batch

    async def _write(self, batch: list[tuple[Record, asyncio.Future[bool]]]) -> list[int]:
        keys: list[str] = []
        values: list[bytes | str | int] = [RESULT_TTL_S * 1000, INBOX_TTL_S * 1000]
        for record, _ in batch:
            keys.append(record.key)
            values += (record.value, record.note, record.inbox)
        return await self._call(lambda: self._script("record", keys, values))

    async def _write_marks(self) -> None:
        marks, self._marks = self._marks, []
        if marks:
            pipeline = self._commands.pipeline(transaction=False)
            for key, value, ttl_ms in marks:
                if ttl_ms:
                    pipeline.set(key, value, px=ttl_ms)
                else:
                    pipeline.pexpire(key, 0)  # which deletes it; whoever may not DEL what he likes may do this
            await self._call(pipeline.execute)

    @staticmethod
    def _tell(batch: list[tuple[Record, asyncio.Future[bool]]], written: list[int]) -> None:
        for (_, done), fresh in zip(batch, written, strict=True):
            if not done.done():
                done.set_result(bool(fresh))

    def _give_up_late(
        self, batch: list[tuple[Record, asyncio.Future[bool]]], error: StoreUnavailable
    ) -> list[tuple[Record, asyncio.Future[bool]]]:
        """What is still worth another try; the others are told, so that their messages go back to the queue."""
        now_ms = self.now_ms()
        for record, done in batch:
            if record.deadline_ms <= now_ms and not done.done():
                done.set_exception(error)
        return [(record, done) for record, done in batch if not done.done()]

    # Documents and plain keys.

    async def get(self, key: str) -> bytes | None:
        found: Any = await self._call(lambda: self._commands.get(key))
        return found  # type: ignore[no-any-return]

    async def get_large(self, key: str) -> bytes | None:
        found: Any = await self._call(lambda: self._large.get(key), LARGE_BUDGET_S)
        return found  # type: ignore[no-any-return]

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        found: Any = await self._call(lambda: self._commands.mget(keys)) if keys else []
        return found  # type: ignore[no-any-return]

    async def set(self, key: str, value: bytes, *, ttl_ms: int | None = None, only_new: bool = False) -> bool:
        written = await self._set(key, value, ttl_ms, only_new=only_new)
        if only_new and not written:  # the client may have sent it twice, since the first answer was lost
            return await self.get_large(key) == value
        return written

    async def _set(self, key: str, value: bytes, ttl_ms: int | None, *, only_new: bool) -> bool:
        client, budget_s = (self._large, LARGE_BUDGET_S) if len(value) > LARGE_BYTES else (self._commands, CALL_BUDGET_S)
        return bool(await self._call(lambda: client.set(key, value, px=ttl_ms, nx=only_new), budget_s))

    async def set_default(self, key: str, value: bytes, *, ttl_ms: int) -> None:
        """Reads nothing: a client may write code, and not read it."""
        if not await self._set(key, value, ttl_ms, only_new=True):
            await self._call(lambda: self._commands.pexpire(key, ttl_ms, gt=True))  # a key without expiry has the longest one

    async def replace(
        self, key: str, old: bytes | None, new: bytes | None, *, ttl_ms: int = 0, guard: Guard | None = None, quiet: bool = False
    ) -> bool:
        keys: list[str] = [key]
        values: list[Any] = [*_optional(old), *_optional(new), ttl_ms, "" if quiet else self._channel]
        if guard is not None:
            keys, values = [key, guard[0]], [*values, *_optional(guard[1])]
        return bool(await self._call(lambda: self._script("replace", keys, values)))

    async def increment(self, key: str, ttl_ms: int) -> int:
        pipeline = self._commands.pipeline(transaction=False)
        pipeline.incr(key)
        pipeline.pexpire(key, ttl_ms)
        count: int = (await self._call(pipeline.execute))[0]
        return count

    async def delete(self, *keys: str, guard: Guard | None = None) -> bool:
        if guard is not None:
            guarded, values = [guard[0], *keys], _optional(guard[1])
            return bool(await self._call(lambda: self._script("delete", guarded, values)))
        if keys:
            await self._call(lambda: self._commands.delete(*keys))
        return True

    async def expire(self, key: str, ttl_ms: int | None) -> None:
        await self._call(lambda: self._commands.persist(key) if ttl_ms is None else self._commands.pexpire(key, ttl_ms))

    async def put_field(self, key: str, field: str, value: bytes) -> None:
        await self._call(lambda: self._commands.hset(key, field, value))

    async def drop_fields(self, key: str, *fields: str) -> None:
        if fields:
            await self._call(lambda: self._commands.hdel(key, *fields))

    async def fields(self, key: str) -> dict[str, bytes]:
        found: dict[Any, Any] = await self._call(lambda: self._commands.hgetall(key))
        return {field.decode(errors="replace"): value for field, value in found.items()}

    # Changes of documents: the message is a hint, the document is the truth.

    def watch(self) -> asyncio.Event:
        event = asyncio.Event()
        self._watchers.add(event)
        if len(self._watchers) == 1 and not any(task.get_name() == "listen" for task in self._tasks):
            self._tasks.append(asyncio.create_task(self._listen(), name="listen"))
        return event

    def unwatch(self, event: asyncio.Event) -> None:
        self._watchers.discard(event)

    async def announce(self) -> None:
        await self._call(lambda: self._commands.publish(self._channel, b""))

    async def _listen(self) -> None:
        """A lost connection resubscribes silently and loses what came in between: so the subscribe message wakes everyone too."""
        pauses = delays()
        while True:
            try:
                async with self._blocking.pubsub() as pubsub:
                    await pubsub.subscribe(self._channel)
                    while True:
                        message = await pubsub.get_message(timeout=BLOCK_S)
                        if message is not None:
                            pauses = delays()
                            self._wake_watchers()
            except _FAILURES as error:
                if refusal := store_refusal(error, self._url):
                    logger.warning("cannot hear of changes, and looks for them every few seconds: %s", refusal)
                await asyncio.sleep(next(pauses))

    def _wake_watchers(self) -> None:
        for event in self._watchers:
            event.set()

    # The inbox of this process.

    async def read_inbox(self, inbox: str, on_notes: Callable[[list[bytes]], None], on_gap: Callable[[], None]) -> None:
        pauses = delays()
        while True:
            try:
                async with asyncio.timeout(CALL_BUDGET_S):
                    await self._blocking.ping()
                self._down_since = math.inf
                on_gap()
                pauses = delays()
                while True:
                    async with asyncio.timeout(BLOCK_S + CALL_BUDGET_S):
                        popped: Any = await self._blocking.blmpop(BLOCK_S, 1, inbox, direction="LEFT", count=INBOX_BATCH)
                    if popped:
                        on_notes(popped[1])
            except _FAILURES as error:
                # Entries popped for the broken connection are lost; their results are not: `on_gap` has them read by key.
                why = store_refusal(error, self._url) or words_of(error)
                logger.warning("lost the inbox at %s (%s); reconnecting", masked(self._url), why)
                self._down_since = min(self._down_since, time.monotonic())
                await asyncio.sleep(next(pauses))

    # Logs: what every process is to hear.

    async def append_log(self, key: str, *entries: bytes) -> None:
        pipeline = self._commands.pipeline(transaction=False)
        for entry in entries:
            pipeline.xadd(key, {b"e": entry}, maxlen=LOG_LENGTH, approximate=True)
        pipeline.pexpire(key, LOG_TTL_S * 1000)
        await self._call(pipeline.execute)

    async def read_log(self, key: str, on_entries: Callable[[list[bytes]], None]) -> None:
        last: bytes | str = "0"
        pauses = delays()
        while True:
            try:
                async with asyncio.timeout(BLOCK_S + CALL_BUDGET_S):
                    found: Any = await self._blocking.xread({key: last}, count=LOG_BATCH, block=int(BLOCK_S * 1000))
                pauses = delays()
                for _, entries in found:
                    last = entries[-1][0]
                    on_entries([fields[b"e"] for _, fields in entries if b"e" in fields])
            except _FAILURES as error:
                logger.warning("lost the log at %s (%s); reconnecting", masked(self._url), words_of(error))
                await asyncio.sleep(next(pauses))

    async def concern(self) -> str:
        try:
            memory: Any = await self._call(lambda: self._commands.info("memory"))
        except StoreUnavailable:
            return ""
        policy = memory.get("maxmemory_policy", "noeviction")
        if policy == "noeviction" or not memory.get("maxmemory"):
            return ""
        return f"Redis forgets answers and configuration when it is full (maxmemory-policy {policy}): set maxmemory-policy to noeviction"

    async def close(self) -> None:
        if self._flusher is not None and not self._flusher.done():
            with suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(CALL_BUDGET_S):
                    await asyncio.shield(self._flusher)
            self._tasks.append(self._flusher)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in (self._commands, self._large, self._blocking):
            with suppress(Exception):
                await client.aclose()

    async def _call(self, call: Callable[[], Awaitable[T]], budget_s: float = CALL_BUDGET_S) -> T:
        began = time.monotonic()
        try:
            async with asyncio.timeout(budget_s):
                result = await _heeding_cancellation(call)
        except _FAILURES as error:
            self._down_since = min(self._down_since, max(began, time.monotonic() - CALL_BUDGET_S))
            refusal = store_refusal(error, self._url)
            raise StoreUnavailable(refusal or f"Redis at {masked(self._url)} did not answer ({words_of(error)})") from error
        self._down_since = math.inf
        return result

    async def _script(self, name: str, keys: Sequence[str], values: Sequence[Any]) -> Any:
        try:
            return await self._commands.evalsha(self._digests[name], len(keys), *keys, *values)
        except NoScriptError:  # the server was restarted
            return await self._commands.eval(self._scripts[name], len(keys), *keys, *values)

    async def _measure_clock(self) -> None:
        """A sample is off by at most half of its round trip: one that says less than what we have already is not taken."""
        before = time.monotonic()
        seconds, microseconds = await _heeding_cancellation(self._commands.time)
        after = time.monotonic()
        error_s = (after - before) / 2
        if error_s <= self._offset_error_s + (after - self._offset_measured_at) * _CLOCK_DRIFT:
            self._offset_ms = (seconds + microseconds / 1e6 - (before + after) / 2) * 1000
            self._offset_error_s, self._offset_measured_at = error_s, after

    async def _keep_clock(self) -> None:
        while True:
            await asyncio.sleep(_CLOCK_EVERY_S)
            with suppress(*_FAILURES):
                async with asyncio.timeout(CALL_BUDGET_S):
                    await self._measure_clock()


def _optional(value: bytes | None) -> tuple[str, bytes]:
    """For scripts, whose arguments cannot be absent."""
    return ("0", b"") if value is None else ("1", value)


async def _heeding_cancellation(call: Callable[[], Awaitable[T]]) -> T:
    """redis-py sends through `asyncio.wait_for`, which before Python 3.12 forgets a cancellation that comes with its result.

    One lost in a hundred, and whoever cancelled waits for ever: a shutdown, or the TaskGroup of a replica that drains.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    result = await call()
    if task and task.cancelling() > before:
        raise asyncio.CancelledError
    return result
