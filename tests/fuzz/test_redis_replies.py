"""Whatever Redis says: each question is told once what came of it, and the connection goes on or ends in words.

hiredis parses; ours is what is done with its findings and errors, and the shape of the two replies that we read.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest
import redis.exceptions
from hypothesis import example, given
from hypothesis import strategies as st

from mqserve.broker.errors import BadEnvelope, StoreUnavailable, words_of
from mqserve.broker.jobs import Done, Held, JobFacts, JobRecord, Leased, Run
from mqserve.broker.redis.append_script import AppendScript
from mqserve.broker.redis.client import FAILURES
from mqserve.broker.redis.hot_wire import HotWire, Lost
from mqserve.broker.redis.inbox import InboxReader
from mqserve.broker.redis.job_script import JobScript
from mqserve.broker.redis.jobs import RedisJobs
from mqserve.broker.redis.kept_wire import KeptWire
from mqserve.broker.redis.record_script import RecordScript
from mqserve.broker.store import Append, Record, Refusal
from mqserve.broker.store_keys import StoreKeys
from tests.fuzz.material import bytes_like, cases

POPPED = b"*2\r\n$5\r\ninbox\r\n*2\r\n$3\r\none\r\n$0\r\n\r\n"
WRITTEN = b"*2\r\n:1\r\n:0\r\n"
APPENDED = b"*2\r\n*2\r\n:7\r\n:-2\r\n*1\r\n$1\r\nk\r\n"
STEPPED = b"*2\r\n*2\r\n*2\r\n$6\r\nleased\r\n:1\r\n*2\r\n*2\r\n$5\r\nstate\r\n$6\r\nfailed\r\n:1\r\n*1\r\n$1\r\nk\r\n"

lines = st.binary(max_size=12).filter(lambda line: b"\r" not in line and b"\n" not in line)
atoms = (
    st.builds(lambda kind, line: kind + line + b"\r\n", st.sampled_from([b"+", b"-", b":", b",", b"(", b"#", b"_", b"-NOSCRIPT "]), lines)
    | st.binary(max_size=12).map(lambda text: b"$%d\r\n%b\r\n" % (len(text), text))
    | st.integers(-3, 3).map(lambda number: b":%d\r\n" % number)
    | st.sampled_from([b"$-1\r\n", b"*-1\r\n", b"_\r\n", b"*0\r\n", b"=7\r\ntxt:abc\r\n"])
)


def many_of(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    rows = st.lists(inner, max_size=4)
    return st.builds(lambda kind, row: kind + b"%d\r\n" % len(row) + b"".join(row), st.sampled_from([b"*", b"~", b">", b"|"]), rows) | (
        st.lists(st.tuples(inner, inner), max_size=3).map(lambda pairs: b"%%%d\r\n" % len(pairs) + b"".join(a + b for a, b in pairs))
    )


replies = st.recursive(atoms, many_of, max_leaves=8)
said = (
    st.lists(replies, max_size=5).map(b"".join)
    | bytes_like(POPPED)
    | bytes_like(WRITTEN)
    | bytes_like(POPPED + WRITTEN)
    | bytes_like(APPENDED)
    | bytes_like(STEPPED)
)
pieces = st.lists(st.integers(1, 30), max_size=6)


class NoWriter:
    """The writer and the transport of a connection that leads nowhere."""

    def __init__(self) -> None:
        self.transport = self
        self.is_aborted = False

    def set_protocol(self, protocol: asyncio.Protocol) -> None: ...

    def get_extra_info(self, name: str) -> None: ...

    def write(self, data: bytes) -> None: ...

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One for all inputs: a new one costs more than all that is done on it."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def with_a_wire(loop: asyncio.AbstractEventLoop, converse: Callable[[HotWire], Awaitable[None]]) -> None:
    """A conversation over a connection of its own."""

    async def run() -> None:
        wire = HotWire(NoWriter())  # type: ignore[arg-type]
        try:
            await converse(wire)
        finally:
            wire.end(Lost("over"))

    loop.run_until_complete(run())


def hear(wire: HotWire, data: bytes, cuts: Sequence[int]) -> None:
    """In pieces, as a network delivers; nothing after the end, as a transport does."""
    for size in [*cuts, len(data)]:
        if data and wire.error is None:
            wire.data_received(data[:size])
        data = data[size:]


def check_end(wire: HotWire) -> None:
    assert wire.error is None or (isinstance(wire.error, FAILURES) and words_of(wire.error))


@pytest.mark.parametrize("data", cases("redis-replies"))
def test_replies_that_did_harm_end_the_connection(data: bytes, loop: asyncio.AbstractEventLoop) -> None:
    async def converse(wire: HotWire) -> None:
        wire.ask(b"", 1, lambda replies: None, 10)
        wire.data_received(data)
        assert isinstance(wire.error, redis.exceptions.InvalidResponse) and str(wire.error)

    with_a_wire(loop, converse)


@given(data=said, cuts=pieces, counts=st.lists(st.integers(1, 3), max_size=4))
def test_each_question_is_told_once(loop: asyncio.AbstractEventLoop, data: bytes, cuts: list[int], counts: list[int]) -> None:
    async def converse(wire: HotWire) -> None:
        told: list[int] = []

        def ask(number: int, count: int) -> None:
            def on_replies(replies: list[Any] | Exception) -> None:
                told.append(number)
                assert len(replies) == count if isinstance(replies, list) else replies is wire.error

            wire.ask(b"", count, on_replies, 10)

        for number, count in enumerate(counts):
            ask(number, count)
        hear(wire, data, cuts)
        check_end(wire)
        wire.end(Lost("over"))
        assert told == list(range(len(counts)))

    with_a_wire(loop, converse)


@given(data=said, cuts=pieces)
def test_an_inbox_gives_notes_or_ends_in_words(loop: asyncio.AbstractEventLoop, data: bytes, cuts: list[int]) -> None:
    async def converse(wire: HotWire) -> None:
        notes: list[bytes] = []
        failures: list[Exception] = []
        begun = asyncio.Event()

        async def dial() -> HotWire:
            return wire

        async def failed(error: Exception, had_answered: bool) -> None:
            failures.append(error)
            await asyncio.Event().wait()

        reader = asyncio.create_task(InboxReader("inbox", dial, notes.extend, begun.set, failed).run())
        await begun.wait()
        await asyncio.sleep(0)
        hear(wire, data, cuts)
        check_end(wire)
        await asyncio.sleep(0)
        assert not reader.done() and all(type(note) is bytes for note in notes)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)

    with_a_wire(loop, converse)


@given(data=said, cuts=pieces)
@example(data=b"-NOSCRIPT a\r\n" * 3, cuts=[])
@example(data=b"-\r\n", cuts=[])
def test_a_batch_is_told_once_by_a_number_for_each_result_or_by_an_error(
    loop: asyncio.AbstractEventLoop, data: bytes, cuts: list[int]
) -> None:
    records = [Record(key, b"v", "", b"", 0) for key in ("a", "b")]

    async def converse(wire: HotWire) -> None:
        outcomes: list[Sequence[int] | Exception] = []
        wires = [wire]

        async def dial() -> HotWire:
            if not wires:
                raise Lost("no more")
            return wires.pop()

        kept = KeptWire(dial, 10)
        script = RecordScript(
            kept, lambda: None, lambda key: None, lambda key: None, lambda error, since, writing: StoreUnavailable(words_of(error))
        )
        await kept.open()
        script.write(records, [("m", b"1", 1), ("n", b"", 0)], [], outcomes.append)
        hear(wire, b"+OK\r\n:0\r\n" + data, cuts)
        check_end(wire)
        wire.end(Lost("over"))
        while not outcomes:  # it dials again
            await asyncio.sleep(0)
        (outcome,) = outcomes
        assert not isinstance(outcome, Exception) or (isinstance(outcome, StoreUnavailable) and str(outcome))
        assert isinstance(outcome, Exception) or [type(how) for how in outcome] == [int, int]
        script.close()

    with_a_wire(loop, converse)


@given(data=said, cuts=pieces)
@example(data=b"-NOSCRIPT a\r\n" * 3, cuts=[])
@example(data=APPENDED, cuts=[])
def test_appends_are_told_once_where_their_streams_end_or_by_an_error(
    loop: asyncio.AbstractEventLoop, data: bytes, cuts: list[int]
) -> None:
    appends = [Append(name, f"s{name}", f"o{name}", f"f{name}", b"c", 1, 7, (b"x",)) for name in ("a", "b")]

    async def converse(wire: HotWire) -> None:
        outcomes: list[Sequence[int | Refusal] | Exception] = []
        wires = [wire]

        async def dial() -> HotWire:
            if not wires:
                raise Lost("no more")
            return wires.pop()

        kept = KeptWire(dial, 10)
        script = AppendScript(kept, lambda: None, lambda key: None, lambda error, since, writing: StoreUnavailable(words_of(error)))
        await kept.open()
        script.write(appends, outcomes.append)
        hear(wire, data, cuts)
        check_end(wire)
        wire.end(Lost("over"))
        while not outcomes:  # it dials again
            await asyncio.sleep(0)
        (outcome,) = outcomes
        assert not isinstance(outcome, Exception) or (isinstance(outcome, StoreUnavailable) and str(outcome))
        assert isinstance(outcome, Exception) or (len(outcome) == 2 and all(isinstance(one, int | Refusal) for one in outcome))
        script.close()

    with_a_wire(loop, converse)


@given(data=said, cuts=pieces)
@example(data=b"-NOSCRIPT a\r\n" * 3, cuts=[])
@example(data=STEPPED, cuts=[])
@example(data=b"*2\r\n*2\r\n-OOM a\r\n:1\r\n*0\r\n", cuts=[])
def test_steps_of_jobs_are_told_once_what_came_of_them_or_an_error(loop: asyncio.AbstractEventLoop, data: bytes, cuts: list[int]) -> None:
    async def converse(wire: HotWire) -> None:
        wires = [wire]

        async def dial() -> HotWire:
            if not wires:
                raise Lost("no more")
            return wires.pop()

        async def call(ask: Callable[[], Awaitable[Any]]) -> Any:
            return await ask()

        kept = KeptWire(dial, 10)
        script = JobScript(
            kept, StoreKeys("ns"), lambda: None, lambda key: None, lambda error, since, writing: StoreUnavailable(words_of(error))
        )
        jobs = RedisJobs(StoreKeys("ns"), script, None, call, lambda: 0)  # type: ignore[arg-type]
        await kept.open()
        asked = [asyncio.ensure_future(jobs.begin(Run("f", b"t", "r", JobFacts("b"), 1))), asyncio.ensure_future(jobs.read("f"))]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        hear(wire, data, cuts)
        check_end(wire)
        wire.end(Lost("over"))
        begun, read = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(begun, Leased | Held | Done | StoreUnavailable)
        assert read is None or isinstance(read, JobRecord | StoreUnavailable | BadEnvelope)
        await jobs.close(0.01)

    with_a_wire(loop, converse)
