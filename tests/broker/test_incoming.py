"""Readers of streamed answers: every chunk once and in order, whatever the inbox lost, and credit for what was taken."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from mqserve.broker.calls import incoming_streams
from mqserve.broker.calls.call import Call
from mqserve.broker.calls.incoming import IncomingStream
from mqserve.broker.calls.sending import RequestSender
from mqserve.broker.envelope import RequestHead, mint_id
from mqserve.broker.errors import MQServeError, StoreUnavailable
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.results import ErrorInfo, InboxEntry, Outcome, Result
from mqserve.broker.store import Place
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.streams import FRAME_BYTES, WINDOW_FRAMES, Chunk, Ending, Form, Head
from tests.broker.flowing import Run
from tests.broker.traffic import until

pytestmark = pytest.mark.anyio


class Reading(Call):
    """A call that takes a streamed answer."""

    def __init__(self) -> None:
        self.id = mint_id()
        self.end: Result | MQServeError | None = None
        self.stream: IncomingStream | None = None

    def answered(self, result: Result) -> None:
        self.end = result

    def began(self, stream: IncomingStream) -> None:
        self.stream = stream

    def failed(self, error: MQServeError) -> None:
        self.end = error

    def abandoned(self) -> None:
        pass


class Reader:
    """A process that reads answers, on a store in memory."""

    def __init__(self) -> None:
        self.store, self.keys, self.queue = EmbeddedStore(), StoreKeys("tests"), EmbeddedQueue()
        self.sender = RequestSender(self.queue, self.store, self.keys, "reader")
        self.streams = self.sender.pending.streams

    def asked(self, timeout_s: float = 60.0) -> Reading:
        call = Reading()
        self.sender.send(call, "b", b"", "text/plain", RequestHead(), origin="http", timeout_s=timeout_s)
        return call

    def run_of(self, call: Reading, form: Form = Form.BODY, *, resumable: bool = False, replays: bool = False) -> Run:
        head = Head(form=form, replica="r", resumable=resumable)
        return Run(self.store, self.keys, call.id, self.sender.pending.inbox, head, replays=replays)

    def lose_connection(self) -> None:
        """As the store says it when entries of the inbox may be lost."""
        self.sender.pending._read_again()


@pytest.fixture
async def reader() -> AsyncIterator[Reader]:
    reader = Reader()
    await reader.queue.declare("b", 1, None)
    reading = asyncio.create_task(reader.sender.run())
    await asyncio.sleep(0)
    yield reader
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def begun(call: Reading) -> IncomingStream:
    await until(lambda: call.stream is not None)
    assert call.stream is not None
    return call.stream


async def resumed(reader: Reader, run: Run, after: int) -> tuple[IncomingStream, int]:
    found = await reader.streams.resume(run.id, run.owner, after, Form.ITEMS)
    assert found is not None
    return found


async def rest_of(stream: IncomingStream) -> list[bytes]:
    chunks: list[Chunk] = []
    async with asyncio.timeout(20):
        while stream.end is None:
            chunks += await stream.more()
    return [chunk.data for chunk in chunks]


async def test_the_first_frame_ends_the_wait_for_the_head(reader: Reader) -> None:
    call = reader.asked(timeout_s=0.3)
    await reader.run_of(call).show(b"a")
    stream = await begun(call)
    assert stream.head is not None and stream.head.replica == "r"
    await asyncio.sleep(0.6)  # past the deadline of the head
    assert call.end is None and stream.end is None and call.id not in reader.sender.pending


async def test_chunks_come_in_order_and_all_that_is_there_at_once(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call)
    await run.show(b"a", b"b")
    await run.show(b"c")
    stream = await begun(call)
    assert await stream.more() == [Chunk(1, b"a"), Chunk(2, b"b"), Chunk(3, b"c")]
    await run.show(b"d")
    await run.end()
    assert await rest_of(stream) == [b"d"]
    assert stream.end is not None and stream.end.outcome is Ending.DONE


@pytest.mark.parametrize("is_told", [True, False])
async def test_an_answer_whose_replica_has_died_ends_as_lost_behind_all_that_it_has_shown(
    reader: Reader, monkeypatch: pytest.MonkeyPatch, *, is_told: bool
) -> None:
    monkeypatch.setattr(incoming_streams, "CREDIT_EVERY_S", 60 if is_told else 0.2)
    call = reader.asked()
    run = reader.run_of(call)
    await run.show(b"a")
    await run.show(b"b", silently=True)
    stream = await begun(call)
    await reader.store.set(reader.keys.lost("r"), b"1")
    if is_told:
        reader.streams.replica_died(reader.keys.feed("another"))
        reader.streams.replica_died(reader.keys.feed("r"))
    assert await rest_of(stream) == [b"a", b"b"]
    assert stream.end is not None and (stream.end.outcome, stream.end.status) == (Ending.LOST, 502)
    recorded = await reader.store.get(reader.keys.future(run.id))
    assert recorded is not None and Result.from_bytes(recorded).frames == 2
    assert not len(reader.streams) and not await run.stands()


async def test_an_answer_whose_replica_has_died_and_that_another_one_replays_goes_on(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call, replays=True)
    await run.show(b"a")
    stream = await begun(call)
    await reader.store.set(reader.keys.lost("r"), b"1")
    reader.streams.replica_died(reader.keys.feed("r"))
    await asyncio.sleep(0.1)
    await run.show(b"b")
    await run.end()
    assert await rest_of(stream) == [b"a", b"b"]
    assert stream.end is not None and stream.end.outcome is Ending.DONE


async def test_a_large_item_is_one_chunk_and_a_part_of_a_body_one_for_each_frame(reader: Reader) -> None:
    large = random.randbytes(2 * FRAME_BYTES + 5)
    for form, count in ((Form.ITEMS, 1), (Form.BODY, 3)):
        call = reader.asked()
        run = reader.run_of(call, form)
        await run.show(large)
        await run.end()
        chunks = await rest_of(await begun(call))
        assert len(chunks) == count and b"".join(chunks) == large


async def test_what_the_inbox_lost_is_read_from_the_stream(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call)
    await run.show(b"1")
    stream = await begun(call)
    await run.show(b"2", b"3", silently=True)
    await run.show(b"4")
    await run.show(b"5", silently=True)
    await run.end()
    assert await rest_of(stream) == [b"1", b"2", b"3", b"4", b"5"]


async def test_what_is_lost_while_the_stream_is_read_is_read_afterwards(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    call = reader.asked()
    run = reader.run_of(call)
    await run.show(b"1")
    stream = await begun(call)
    reader.lose_connection()
    await until(lambda: stream.place.seq == 1)
    read, reading, replied = reader.store.read_stream, asyncio.Event(), asyncio.Event()

    async def read_slowly(key: str, after: Place, count: int = 64) -> list[tuple[Place, bytes]]:
        found = await read(key, after, count)
        reading.set()
        await replied.wait()
        return found

    monkeypatch.setattr(reader.store, "read_stream", read_slowly)
    reader.lose_connection()
    await reading.wait()
    await run.show(b"2", silently=True)
    reader.lose_connection()
    replied.set()
    async with asyncio.timeout(2):
        assert [chunk.data for chunk in stream.take() or await stream.more()] == [b"1"]
        assert [chunk.data for chunk in await stream.more()] == [b"2"]


async def test_an_answer_that_flows_fast_keeps_no_other_from_being_read(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = reader.asked(), reader.asked()
    runs = [reader.run_of(call) for call in (fast, slow)]
    for run in runs:
        await run.show(b"1")
    streams = [await begun(call) for call in (fast, slow)]
    read, (key, _) = reader.store.read_stream, runs[0].keys

    async def read_while_it_flows(wanted: str, after: Place, count: int = 64) -> list[tuple[Place, bytes]]:
        if wanted == key:
            await runs[0].show(b"more")
        await asyncio.sleep(0)
        return await read(wanted, after, count)

    monkeypatch.setattr(reader.store, "read_stream", read_while_it_flows)
    taking = asyncio.create_task(rest_of(streams[0]))
    await runs[1].show(b"2", silently=True)
    reader.lose_connection()
    async with asyncio.timeout(2):
        assert [chunk.data for chunk in await streams[1].more()] == [b"1"]
        assert [chunk.data for chunk in await streams[1].more()] == [b"2"]
    taking.cancel()


async def test_a_head_that_the_inbox_lost_is_found_after_a_gap(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call)
    await run.show(b"1", silently=True)
    reader.lose_connection()
    stream = await begun(call)
    await run.show(b"2", silently=True)
    await run.end(silently=True)
    reader.lose_connection()
    assert await rest_of(stream) == [b"1", b"2"]


async def test_an_answer_that_is_all_there_before_its_reader_hears_of_it_is_read(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call)
    await run.show(b"1", b"2", silently=True)
    await run.end()
    assert await rest_of(await begun(call)) == [b"1", b"2"]


async def test_frames_that_are_told_twice_or_out_of_order_count_once(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call)
    await run.show(*[b"%d" % number for number in range(40)], silently=True)
    entries = await reader.store.read_stream(reader.keys.stream(call.id), (0, 0), 64)  # type: ignore[arg-type]
    told = [InboxEntry(1, call.id, 1, place.seq, raw).to_bytes() for place, raw in entries] * 3
    random.shuffle(told)
    for note in told:
        reader.store._post_all(reader.sender.pending.inbox, [note])
    await run.end()
    assert await rest_of(await begun(call)) == [b"%d" % number for number in range(40)]


async def test_what_the_store_has_lost_is_told_after_what_came(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call)
    await run.show(b"1")
    stream = await begun(call)
    await run.show(b"2", silently=True)
    reader.store.drop_soon(reader.keys.stream(call.id))
    reader.streams.ends(call.id, Result(frames=2))
    assert await rest_of(stream) == [b"1"]
    assert stream.end is not None and stream.end.outcome is Ending.LOST and stream.end.error is not None


async def test_a_request_is_cancelled_whose_reader_alone_has_given_up(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call)
    await run.show(b"1")
    stream = await begun(call)
    await run.show(b"2", b"3", silently=True, trim_to=2)
    reader.lose_connection()
    assert await rest_of(stream) == [b"1"]
    assert stream.end is not None and stream.end.outcome is Ending.LOST
    reader.sender.leave(stream)
    await reader.sender.settle()
    raw = await reader.store.get(reader.keys.future(call.id))
    assert raw is not None and Result.from_bytes(raw).outcome is Outcome.CANCELLED


async def test_a_request_is_cancelled_whose_frames_do_not_parse(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call)
    await run.show(b"1")
    stream = await begun(call)
    await run._append([b"\xc1"], run.inboxes)
    assert await rest_of(stream) == [b"1"]
    assert stream.end is not None and stream.end.outcome is Ending.FAILED
    reader.sender.leave(stream)
    await reader.sender.settle()
    raw = await reader.store.get(reader.keys.future(call.id))
    assert raw is not None and Result.from_bytes(raw).outcome is Outcome.CANCELLED


async def test_an_error_comes_after_the_frames_that_are_there(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call)
    await run.show(b"1", b"2")
    await run.end(ErrorInfo("ValueError", "no"))
    stream = await begun(call)
    assert await rest_of(stream) == [b"1", b"2"]
    assert stream.end is not None and stream.end.outcome is Ending.FAILED and stream.end.error == ErrorInfo("ValueError", "no")


async def test_credit_is_given_when_half_the_window_is_taken_and_not_before(reader: Reader) -> None:
    call = reader.asked()
    async with reader.run_of(call) as run:
        await run.show(*[b"x"] * (WINDOW_FRAMES // 2 - 1))
        stream = await begun(call)
        await stream.more()
        taking = asyncio.create_task(stream.more())
        await asyncio.sleep(0.05)
        assert not run.credits
        await run.show(b"x")
        await taking
        assert not run.credits  # what was handed out is taken when the reader comes back
        taking = asyncio.create_task(stream.more())
        await until(lambda: bool(run.credits))
        assert (run.credits[0].seq, run.credits[0].renews) == (WINDOW_FRAMES // 2, True)
        taking.cancel()


async def test_a_chunk_larger_than_the_window_gets_credit_before_it_is_complete(reader: Reader) -> None:
    call = reader.asked()
    async with reader.run_of(call, Form.ITEMS) as run:
        await run.show(b"first")
        stream = await begun(call)
        taking = asyncio.create_task(rest_of(stream))
        await asyncio.sleep(0)
        await run.show(b"x" * FRAME_BYTES * 20)
        await until(lambda: bool(run.credits))
        await run.end()
        assert [len(chunk) for chunk in await taking] == [5, FRAME_BYTES * 20]


async def test_a_reader_that_takes_nothing_holds_little_and_gets_all_later(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call)
    for _ in range(100):
        await run.show(b"x" * FRAME_BYTES)
    stream = await begun(call)
    assert stream._held <= 3 * 1024 * 1024
    await run.end()
    assert len(b"".join(await rest_of(stream))) == 100 * FRAME_BYTES


async def test_the_end_of_an_answer_leaves_no_key_but_its_result(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call)
    await run.show(b"1")
    assert await run.stands()
    await run.end()
    assert await rest_of(await begun(call)) == [b"1"]
    assert not await run.stands() and len(reader.sender.pending) == 0


async def test_what_others_may_read_again_stays(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call, Form.ITEMS, resumable=True)
    await run.show(b"1")
    await run.end()
    await rest_of(await begun(call))
    assert await run.stands()


async def test_who_leaves_cancels_the_request_unless_it_can_be_resumed(reader: Reader) -> None:
    for resumable in (False, True):
        call = reader.asked()
        async with reader.run_of(call, Form.ITEMS, resumable=resumable) as run:
            await run.show(b"1")
            stream = await begun(call)
            reader.sender.leave(stream)
            assert stream.end is not None and len(reader.streams) == 0
            await reader.sender.settle()
            raw = await reader.store.get(reader.keys.future(call.id))
            assert (raw is not None and Result.from_bytes(raw).outcome is Outcome.CANCELLED) == (not resumable)
            await until(lambda run=run, left=[True] * resumable: [credit.left for credit in run.credits] == left)  # type: ignore[misc]


async def test_a_request_that_is_cancelled_elsewhere_ends_its_stream(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call)
    await run.show(b"1")
    stream = await begun(call)
    reader.sender.end_cancelled(call.id)
    assert await rest_of(stream) == [b"1"]
    assert stream.end is not None and stream.end.outcome is Ending.CANCELLED


async def test_a_process_that_stops_reading_ends_its_streams() -> None:
    reader = Reader()
    await reader.queue.declare("b", 1, None)
    reading = asyncio.create_task(reader.sender.run())
    await asyncio.sleep(0)
    call = reader.asked()
    await reader.run_of(call).show(b"1")
    stream = await begun(call)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert await rest_of(stream) == [b"1"]
    assert stream.end is not None and stream.end.outcome is Ending.LOST


@pytest.mark.parametrize("after", [0, 2, 4])
async def test_a_later_reader_goes_on_where_another_stopped(reader: Reader, after: int) -> None:
    call = reader.asked()
    async with reader.run_of(call, Form.ITEMS, resumable=True) as run:
        await run.show(b"1", b"2", b"3", b"4")
        first = await begun(call)
        reader.sender.leave(first)
        stream, there = await resumed(reader, run, after)
        assert there == after + 1
        await until(lambda: bool(run.credits) and not run.credits[-1].left)
        assert run.credits[-1].inbox == reader.sender.pending.inbox and not run.credits[-1].renews
        await run.show(b"5")
        await run.end()
        assert await rest_of(stream) == [b"1", b"2", b"3", b"4", b"5"][after:]


async def test_a_later_reader_learns_where_what_is_kept_begins(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call, Form.ITEMS, resumable=True)
    await run.show(b"1", b"2", b"3")
    await run.show(b"4", trim_to=2)
    await run.end()
    stream, there = await resumed(reader, run, 1)
    assert there == 3 and await rest_of(stream) == [b"3", b"4"]


async def test_two_readers_of_one_answer_get_all_of_it_and_the_later_one_gives_the_credit(reader: Reader) -> None:
    call = reader.asked()
    async with reader.run_of(call, Form.ITEMS, resumable=True) as run:
        await run.show(b"1")
        first = await begun(call)
        later, _ = await resumed(reader, run, 0)
        await until(lambda: len(run.credits) == 1)
        given = len(run.credits)
        taking = asyncio.create_task(rest_of(first))
        for number in range(WINDOW_FRAMES):
            await run.show(b"%d" % number)
        await asyncio.sleep(0.05)
        assert len(run.credits) == given, "only the earlier one has taken anything"
        await run.end()
        assert await taking == await rest_of(later) == [b"1", *[b"%d" % number for number in range(WINDOW_FRAMES)]]


async def test_a_reader_that_is_not_told_any_more_reads_the_store(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call, Form.ITEMS, resumable=True)
    await run.show(b"1")
    await begun(call)
    stream, _ = await resumed(reader, run, 0)
    for chunk in (b"2", b"3"):
        await run.show(chunk, silently=True)
    await run.end(silently=True)
    assert await rest_of(stream) == [b"1", b"2", b"3"]


async def test_a_chunk_whose_beginning_is_not_kept_is_left_out(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call, Form.ITEMS, resumable=True)
    await run.show(b"1", b"x" * FRAME_BYTES * 3)
    await run.show(b"whole", trim_to=2)
    await run.end()
    stream, there = await resumed(reader, run, 1)
    assert there == 3 and await rest_of(stream) == [b"whole"]


async def test_values_are_no_events(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call, Form.VALUES, resumable=True)
    await run.show(b"1")
    assert await reader.streams.resume(call.id, run.owner, 0, Form.ITEMS) is None


async def test_a_reader_follows_its_answer_to_another_replica(reader: Reader) -> None:
    call = reader.asked()
    run = reader.run_of(call)
    await run.show(b"1")
    stream = await begun(call)
    run.head = Head(replica="other")
    await run.show(b"2")
    assert await stream.more() == [Chunk(1, b"1"), Chunk(2, b"2")]
    assert stream.head is not None and stream.head.replica == "other"


async def test_a_reader_that_hears_nothing_for_too_long_looks_for_the_end_and_gives_up(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming_streams, "CREDIT_EVERY_S", 0.05)
    monkeypatch.setattr(incoming_streams, "LONGER_S", 0.2)
    for is_recorded in (True, False):
        call = reader.asked()
        head = Head(replica="r", idle_s=0.5)
        run = Run(reader.store, reader.keys, call.id, reader.sender.pending.inbox, head)
        await run.show(b"1")
        stream = await begun(call)
        if is_recorded:
            await run.end(silently=True)
        assert await rest_of(stream) == [b"1"]
        assert stream.end is not None and stream.end.outcome is (Ending.DONE if is_recorded else Ending.LATE)


async def test_credit_is_repeated_while_a_reader_waits(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming_streams, "CREDIT_EVERY_S", 0.05)
    call = reader.asked()
    async with reader.run_of(call) as run:
        await run.show(b"1")
        taking = asyncio.create_task(rest_of(await begun(call)))
        await until(lambda: len(run.credits) >= 2)
        assert {credit.seq for credit in run.credits} == {1}
        await run.end()
        assert await taking == [b"1"]


async def test_who_cannot_go_on_with_an_answer_leaves_no_reader(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(key: str) -> int:
        raise StoreUnavailable("the store is away")

    call = reader.asked()
    run = reader.run_of(call, Form.ITEMS, resumable=True)
    await run.show(b"1", b"2")
    await run.end()
    reader.sender.leave(await begun(call))
    await until(lambda: len(reader.streams) == 0)
    monkeypatch.setattr(reader.store, "last_of_stream", refuse)
    with pytest.raises(StoreUnavailable):
        await resumed(reader, run, 0)
    assert len(reader.streams) == 0
