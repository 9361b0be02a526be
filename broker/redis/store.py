"""The store on Redis 7: results in one script call per flush, one reader of the inbox, budgets of our own on every call.

redis-py's defaults suit no request: one GET on a frozen server takes 58.9 s. Commands get one connection pool with short timeouts; what
blocks gets a client of its own. Results, beats, large reads and the inbox have connections without redis-py (`hot_wire.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from redis.exceptions import NoScriptError, ResponseError

from ..backoff import delays, keep_running
from ..envelope import mint_id
from ..errors import StoreUnavailable, WrongType, words_of, wrong_type
from ..process.rate_limited_log import RateLimitedLog
from ..process.tasks import Tasks
from ..result_files import NO_FILES, ResultFiles
from ..settings import masked
from ..store import WRONG_TYPE, Append, Guard, OnAppended, OnRecorded, Place, Record
from ..store_keys import LOG_LENGTH, LOG_TTL_S, StoreKeys
from .append_script import AppendScript
from .append_writer import AppendWriter
from .batch_sender import CALL_BUDGET_S, REPLY_S
from .client import FAILURES, blocking_client, heeding_cancellation, pooled_client
from .clock import StoreClock
from .health import StoreHealth
from .hot_wire import HotWire, dial
from .inbox import BLOCK_S, InboxReader
from .job_script import JobScript
from .jobs import RedisJobs
from .kept_wire import KeptWire
from .many_keys import expire_keys, extend_keys
from .record_script import TEXT as RECORD_TEXT
from .record_script import RecordScript
from .refusals import DEMOTED, almost_full, forgetting, key_of, refusal_code, store_refusal
from .result_writer import ResultWriter
from .stream_reads import read_entries, read_last

logger = logging.getLogger(__name__)

CONNECT_BUDGET_S = 5.0
LARGE_BYTES = 64 * 1024
LARGE_BUDGET_S = 30.0  # for what has more: bodies that travel by reference, and code. Whoever waits for it has a deadline of his own
LARGE_SILENCE_S = 5.0  # of a server that sends a large value: then the connection is dead
LOG_BATCH = 1000
_LAST_CALLS_S = 0.5
_HERE = Path(__file__).parent
T = TypeVar("T")


@asynccontextmanager
async def open_redis(url: str, namespace: str, files: ResultFiles = NO_FILES) -> AsyncIterator[RedisStore]:
    """Connected on entry, or StoreUnavailable within CONNECT_BUDGET_S; closed on exit."""
    store = RedisStore(url, namespace, files)
    try:
        await store.connect()
        yield store
    finally:
        await store.close()


class RedisStore:
    """Implements `Store`; made by `open_redis`."""

    def __init__(self, url: str, namespace: str, files: ResultFiles = NO_FILES) -> None:
        self._url = url
        self.files = files
        keys = StoreKeys(namespace)
        self._channel = keys.changed
        self._probe_key = keys.future(f"probe-{mint_id()}")  # a result is what all but nodes may write
        self._commands = pooled_client(url, connections=16, budget_s=2.0, tries=2)
        self._large = pooled_client(url, connections=8, budget_s=LARGE_BUDGET_S, tries=2)
        self._blocking = blocking_client(url)
        self._scripts = {"record": RECORD_TEXT, **{name: (_HERE / f"{name}.lua").read_text() for name in ("replace", "delete")}}
        self._digests: dict[str, str] = {}
        self._clock = StoreClock(self._commands, CALL_BUDGET_S)
        self.now_ms = self._clock.now_ms
        self.health = StoreHealth()
        self._wire = KeptWire(self._dial, REPLY_S)  # for results and beats
        self._large_wire = KeptWire(self._dial, LARGE_SILENCE_S, in_parts=True)
        self._record = RecordScript(self._wire, self.health.wrote, self._note, self._list_is_odd, self._write_failed)
        self._writer = ResultWriter(self._record.write, self.now_ms)
        # Over a wire of its own: Appends may be large, and results, beats and credit are not to wait for them.
        self._append = AppendScript(KeptWire(self._dial, REPLY_S), self.health.wrote, self._note, self._write_failed)
        self._appends = AppendWriter(self._append.write)
        steps = JobScript(KeptWire(self._dial, REPLY_S), keys, self.health.wrote, self._note, self._write_failed)
        self.jobs = RedisJobs(keys, steps, self._commands, self._call, self.now_ms)
        self._watchers: set[asyncio.Event] = set()
        self._taken_away = RateLimitedLog(logger)
        self._tasks: list[asyncio.Task[None]] = []
        self._leaving = Tasks()
        self._calls = 0  # under way

    def __repr__(self) -> str:
        return f"<RedisStore {masked(self._url)}, {'up' if self.health.connected else 'down'}, {self._writer!r}>"

    async def connect(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_BUDGET_S):
                for name, text in self._scripts.items():
                    self._digests[name] = await self._commands.script_load(text)
                await self._wire.open()  # ahead of the first batch, when the server may take no more of them
                await self._clock.set()
        except FAILURES as error:
            why = f" within {CONNECT_BUDGET_S:g} s" if isinstance(error, TimeoutError) else f" ({words_of(error)})"
            raise StoreUnavailable(
                store_refusal(error, self._url)
                or f"no connection to Redis at {masked(self._url)}{why}; is it running, and is MQSERVE_STORE_URL right?"
            ) from error
        self.health.answered()
        self._tasks.append(asyncio.create_task(keep_running("the store's clock", self._clock.keep), name="keep the store's clock"))

    # Results and streams: collected in this turn, written by one script call each.

    def record(self, record: Record) -> asyncio.Future[bool]:
        return self._writer.record(record)

    def record_then(self, record: Record, on_recorded: OnRecorded) -> None:
        self._writer.record_then(record, on_recorded)

    def mark(self, key: str, value: bytes, ttl_ms: int) -> None:
        self._writer.mark(key, value, max(1, ttl_ms))

    def drop_soon(self, key: str) -> None:
        self._writer.mark(key, b"", 0)

    def post(self, key: str, entry: bytes) -> None:
        self._writer.post(key, entry)

    def _list_is_odd(self, key: str) -> None:
        self._note(key)
        self.drop_soon(key)

    def _write_failed(self, error: Exception, since: float, writing: bool) -> StoreUnavailable:
        self._failed(error, max(since, time.monotonic() - CALL_BUDGET_S), writing=writing)
        return self._unavailable(error)

    async def _dial(self) -> HotWire:
        wire = await dial(self._blocking, CALL_BUDGET_S)
        self.health.answered()
        return wire

    def append_then(self, append: Append, on_appended: OnAppended) -> None:
        self._appends.append_then(append, on_appended)

    async def read_stream(self, key: str, after: Place, count: int = 64) -> list[tuple[Place, bytes]]:
        try:
            return await self._call(lambda: read_entries(self._large_wire, key, after, count), LARGE_BUDGET_S)
        except WrongType:
            self._note(key)
            return []

    async def last_of_stream(self, key: str) -> int:
        try:
            return await self._call(lambda: read_last(self._commands, key))
        except WrongType:
            self._note(key)
            return 0

    # Documents and plain keys.

    async def get(self, key: str) -> bytes | None:
        return await self._call(lambda: self._read(self._commands.get, key))

    async def get_large(self, key: str) -> bytes | None:
        """Over a wire, one value after the other: it copies a value twice and redis-py five times, in 250 µs for 1 MB instead of 110."""
        return await self._call(lambda: self._read(partial(self._large_wire.ask, "GET"), key), LARGE_BUDGET_S)

    async def _read(self, get: Callable[[str], Awaitable[Any]], key: str) -> bytes | None:
        try:
            found = await get(key)
        except ResponseError as error:
            if refusal_code(error) != "WRONGTYPE":
                raise
            self._note(key)
            return WRONG_TYPE
        return found  # type: ignore[no-any-return]

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        found: Any = await self._call(lambda: self._commands.mget(keys)) if keys else []
        return found  # type: ignore[no-any-return]

    async def get_documents(self, keys: Sequence[str]) -> list[bytes | None]:
        pipeline = self._commands.pipeline(transaction=False)
        for key in keys:
            pipeline.get(key)
        found: list[Any] = await self._call(lambda: pipeline.execute(raise_on_error=False))
        for key, value in zip(keys, found, strict=True):
            if isinstance(value, Exception) and refusal_code(value) != "WRONGTYPE":
                raise self._unavailable(ResponseError(f"GET {key}: {value}", status_code=refusal_code(value))) from value
            if isinstance(value, Exception):
                self._note(key)
        return [WRONG_TYPE if isinstance(value, Exception) else value for value in found]

    async def set(self, key: str, value: bytes, *, ttl_ms: int | None = None, only_new: bool = False) -> bool:
        written = await self._set(key, value, ttl_ms, only_new=only_new)
        if only_new and not written:  # the client may have sent it twice, since the first answer was lost
            return await self.get_large(key) == value
        return written

    async def _set(self, key: str, value: bytes, ttl_ms: int | None, *, only_new: bool) -> bool:
        client, budget_s = (self._large, LARGE_BUDGET_S) if len(value) >= LARGE_BYTES else (self._commands, CALL_BUDGET_S)
        return bool(await self._call(lambda: client.set(key, value, px=ttl_ms, nx=only_new), budget_s, writing=True))

    async def put_if_absent(self, key: str, value: bytes, *, ttl_ms: int) -> None:
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
        count: int = (await self._call(pipeline.execute, writing=True))[0]
        return count

    async def delete(self, *keys: str, guard: Guard | None = None) -> bool:
        if guard is not None:
            guarded, values = [guard[0], *keys], _optional(guard[1])
            return bool(await self._call(lambda: self._script("delete", guarded, values)))
        if keys:
            await self._call(lambda: self._commands.delete(*keys))
        return True

    async def expire(self, keys: Sequence[str], ttl_ms: int | None) -> None:
        await expire_keys(self._commands, self._call, keys, ttl_ms)

    async def extend(self, keys: Sequence[str], ttl_ms: int) -> frozenset[str]:
        return await extend_keys(self._commands, self._call, keys, ttl_ms)

    async def put_field(self, key: str, field: str, value: bytes) -> None:
        await self._made_anew(key, lambda: self._wire.ask("HSET", key, field, value))

    async def drop_fields(self, key: str, *fields: str) -> None:
        if fields:
            await self._made_anew(key, lambda: self._commands.hdel(key, *fields), writing=False)

    async def fields(self, key: str) -> dict[str, bytes]:
        found: dict[Any, Any] = await self._call(lambda: self._commands.hgetall(key))
        return {field.decode(errors="replace"): value for field, value in found.items()}

    async def take_away(self, key: str) -> None:
        self._note(key)
        self._taken_away.say(f"deleting {key}, which another program wrote, and which members write anew: find that program and stop it")
        await self._call(lambda: self._commands.pexpire(key, 0))  # which deletes it; roles without DEL may do this

    async def _took_away(self, key: str, error: BaseException) -> bool:
        """Whether that was what was wrong with it."""
        if refusal_code(error) != "WRONGTYPE":
            return False
        with suppress(StoreUnavailable):
            await self.take_away(key)
        return True

    async def _made_anew(self, key: str, write: Callable[[], Awaitable[T]], *, writing: bool = True) -> T:
        """Of what members write again and again: a value of another type gives way."""
        try:
            return await self._call(write, writing=writing)
        except WrongType:
            await self.take_away(key)
            return await self._call(write, writing=writing)

    async def probe(self) -> None:
        await self._call(lambda: self._commands.set(self._probe_key, b"", px=1), writing=True)

    # Changes of documents: the message is a hint, the document is the truth.

    def watch(self) -> asyncio.Event:
        event = asyncio.Event()
        self._watchers.add(event)
        if len(self._watchers) == 1 and not any(task.get_name() == "listen" for task in self._tasks):
            self._tasks.append(asyncio.create_task(keep_running("the listener to changes", self._listen), name="listen"))
        return event

    def unwatch(self, event: asyncio.Event) -> None:
        self._watchers.discard(event)

    async def announce(self) -> None:
        await self._call(lambda: self._commands.publish(self._channel, b""))

    async def _listen(self) -> None:
        """A lost connection resubscribes silently and loses what came in between: so the subscribe message wakes everyone too."""
        pauses, log = delays(), RateLimitedLog(logger)
        while True:
            try:
                async with self._blocking.pubsub() as pubsub:
                    await pubsub.subscribe(self._channel)
                    while True:
                        message = await pubsub.get_message(timeout=BLOCK_S)
                        if message is not None:
                            pauses = delays()
                            log.over()
                            self._wake_watchers()
            except FAILURES as error:
                if refusal := store_refusal(error, self._url):
                    log.say(f"cannot hear of changes, and looks for them every few seconds: {refusal}")
                await asyncio.sleep(next(pauses))

    def _wake_watchers(self) -> None:
        for event in self._watchers:
            event.set()

    # The inbox of this process.

    async def read_inbox(self, inbox: str, on_notes: Callable[[list[bytes]], None], on_gap: Callable[[], None]) -> None:
        log = RateLimitedLog(logger)

        async def failed(error: Exception, had_answered: bool) -> None:
            if had_answered:
                log.over()
            self._failed(error, time.monotonic())
            if not await self._took_away(inbox, error):
                why = store_refusal(error, self._url) or words_of(error)
                log.say(f"lost the inbox at {masked(self._url)} ({why}); reconnecting")

        await InboxReader(inbox, self._dial, on_notes, on_gap, failed).run()

    # Logs: what every process is to hear.

    async def append_log(self, key: str, *entries: bytes) -> None:
        async def append() -> None:
            pipeline = self._commands.pipeline(transaction=False)
            for entry in entries:
                pipeline.xadd(key, {b"e": entry}, maxlen=LOG_LENGTH, approximate=True)
            pipeline.pexpire(key, LOG_TTL_S * 1000)
            await pipeline.execute()

        await self._made_anew(key, append)

    async def read_log(self, key: str, on_entries: Callable[[list[bytes]], None]) -> None:
        last: bytes | str = "0"
        pauses, log = delays(), RateLimitedLog(logger)
        while True:
            try:
                async with asyncio.timeout(BLOCK_S + CALL_BUDGET_S):
                    found: Any = await self._blocking.xread({key: last}, count=LOG_BATCH, block=int(BLOCK_S * 1000))
                pauses = delays()
                log.over()
                for _, entries in found:
                    last = entries[-1][0]
                    on_entries([fields[b"e"] for _, fields in entries if b"e" in fields])
            except FAILURES as error:
                if not await self._took_away(key, error):
                    log.say(f"lost the log at {masked(self._url)} ({store_refusal(error, self._url) or words_of(error)}); reconnecting")
                await asyncio.sleep(next(pauses))

    async def fullness(self, *, was_full: bool) -> str:
        try:
            memory: Any = await self._call(lambda: self._commands.info("memory"))
        except StoreUnavailable:
            return ""
        return almost_full(memory, was_full=was_full)

    async def misconfiguration(self) -> str:
        try:
            memory: Any = await self._call(lambda: self._commands.info("memory"))
        except StoreUnavailable:
            return ""
        return forgetting(memory)

    async def close(self) -> None:
        await asyncio.gather(*(writer.close(CALL_BUDGET_S) for writer in (self._writer, self._appends, self.jobs)))
        self._record.close()
        self._append.close()
        self._large_wire.close()
        self._leaving.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(TimeoutError):  # a connection that a cancelled call is still opening would stay open in a pool that is closed
            async with asyncio.timeout(_LAST_CALLS_S):
                while self._calls:
                    await asyncio.sleep(0.001)
        for client in (self._commands, self._large, self._blocking):
            with suppress(Exception):
                await client.aclose()

    async def _call(self, call: Callable[[], Awaitable[T]], budget_s: float = CALL_BUDGET_S, *, writing: bool = False) -> T:
        """`writing`: what goes through only where the server takes what needs memory."""
        began = time.monotonic()
        self._calls += 1
        try:
            async with asyncio.timeout(budget_s):
                result = await heeding_cancellation(call)
        except FAILURES as error:
            self._failed(error, max(began, time.monotonic() - CALL_BUDGET_S), writing=writing)
            raise self._unavailable(error) from error
        finally:
            self._calls -= 1
        if writing:
            self.health.wrote()
        else:
            self.health.answered()
        return result

    def _unavailable(self, error: BaseException) -> StoreUnavailable:
        if refusal_code(error) == "WRONGTYPE" and (key := key_of(error)):
            return WrongType(key)
        words = store_refusal(error, self._url) or f"Redis at {masked(self._url)} did not answer ({words_of(error)})"
        return StoreUnavailable(words, public=self.health.trouble)

    def _note(self, key: str) -> None:
        if self.health.note(key):
            logger.warning("%s", wrong_type(key))

    def _failed(self, error: BaseException, since: float, *, writing: bool = False) -> None:
        self.health.failed(error, since, writing=writing)
        if refusal_code(error) in DEMOTED:  # the address may lead to the new primary by now
            self._leaving.start(self._leave_server())

    async def _leave_server(self) -> None:
        for wire in (self._wire, self._large_wire, self._append, self.jobs):
            wire.hang_up()
        for client in (self._commands, self._large, self._blocking):
            await client.connection_pool.disconnect(inuse_connections=False)

    async def _script(self, name: str, keys: Sequence[str], values: Sequence[Any]) -> Any:
        try:
            return await self._commands.evalsha(self._digests[name], len(keys), *keys, *values)
        except NoScriptError:  # the server was restarted
            return await self._commands.eval(self._scripts[name], len(keys), *keys, *values)


def _optional(value: bytes | None) -> tuple[str, bytes]:
    """For scripts, whose arguments cannot be absent."""
    return ("0", b"") if value is None else ("1", value)
