"""Streamed answers where a reader, the store or a replica fails: what is written stays one answer of one run, or ends visibly."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest

from mqserve.broker.calls.cancellations import notice_of_proxy, notice_of_request
from mqserve.broker.envelope import Envelope, StreamReply
from mqserve.broker.errors import BrokerUnavailable, StoreUnavailable
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.queue import Settled
from mqserve.broker.results import Outcome
from mqserve.broker.store import Append, OnAppended, Place, Refusal
from mqserve.broker.streams import REPLICA_LOST, WINDOW_FRAMES, Credit, Owner
from mqserve.replicas import flows, outgoing, stuck
from tests.broker.traffic import publish, until
from tests.replicas.streaming import EVENTS, KEYS, Reader, Serving, within

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def each_chunk_is_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are joined by chance of time, and these tests count frames."""
    monkeypatch.setattr(outgoing, "JOINED_BYTES", 0)


class SlowStore(EmbeddedStore):
    """Takes a while to say where a stream ends."""

    async def last_of_stream(self, key: str) -> int:
        await asyncio.sleep(1)
        return await super().last_of_stream(key)


class Steps:
    """A generator of numbers that goes on when it is let."""

    def __init__(self, count: int = 10) -> None:
        self.count = count
        self.let = threading.Semaphore(0)
        self.runs = 0
        self.resumed: list[int] = []
        self.ended = threading.Event()
        self.reads = False

    def __call__(self, request: Any) -> Iterator[str]:
        self.runs += 1
        first = request.resume_after if self.reads else 0
        self.resumed.append(first)
        try:
            for number in range(first, self.count):
                assert self.let.acquire(timeout=30)
                yield f"{number} "
        finally:
            self.ended.set()

    def go(self, count: int) -> None:
        for _ in range(count):
            self.let.release()


ALL = b"0 1 2 3 4 5 6 7 8 9 "


class BadStore(EmbeddedStore):
    """Refuses appends while it is `away`, and loses what it had if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.refused = 0

    def append_then(self, append: Append, on_appended: OnAppended) -> None:
        if self.away:
            self.refused += 1
            return on_appended(StoreUnavailable("it is away"))
        super().append_then(append, on_appended)

    def lose(self, future_id: str, behind: int) -> None:
        """As a server that was killed within a second of the last writes."""
        stream = self._streams.get(KEYS.stream(future_id))
        assert stream is not None
        stream.last = behind
        stream._entries = [entry for entry in stream._entries if entry[0].seq <= behind]


class LateStore(EmbeddedStore):
    """Its replies to appends come late, when credit for those frames may have come already."""

    def append_then(self, append: Append, on_appended: OnAppended) -> None:
        loop = asyncio.get_running_loop()

        def tell(outcome: int | Refusal | Exception) -> None:
            loop.call_later(0.3, on_appended, outcome)

        super().append_then(append, tell)


def frames_of(entries: list[Any]) -> list[int]:
    return [place.seq for place, _ in entries]


async def test_what_the_store_does_not_take_is_appended_again_until_it_does() -> None:
    queue, store, steps = EmbeddedQueue(), BadStore(), Steps()
    async with Serving(steps, queue, store) as serving:
        reader = await Reader(queue, store).ask()
        steps.go(3)
        await until(lambda: len(reader.frames) == 3)
        store.away = True
        steps.go(4)
        await until(lambda: store.refused > 2)
        store.away = False
        steps.go(3)
        result = await reader.end()
        assert reader.body == ALL and result.frames == 10 and steps.runs == 1
        await until(serving.is_settled)


async def test_the_end_of_a_stream_that_was_given_up_is_recorded_once_the_store_takes_it() -> None:
    queue, store, steps = EmbeddedQueue(), BadStore(), Steps()
    async with Serving(steps, queue, store) as serving:
        reader = await Reader(queue, store).ask()
        steps.go(2)
        await until(lambda: len(reader.frames) == 2)
        store.away = True
        await store.append_log(KEYS.cancelled, notice_of_request(reader.id))
        steps.go(1)
        await until(lambda: store.refused > 3)
        assert not await queue.depth("b", 1) and serving.loop.running == 1
        store.away = False
        result = await reader.end()
        assert (result.status, result.frames) == (499, 2)
        await until(serving.is_settled)
        assert steps.runs == 1


async def test_credit_counts_that_overtakes_the_reply_of_the_store() -> None:
    queue, store, steps = EmbeddedQueue(), LateStore(), Steps(WINDOW_FRAMES + 1)
    async with Serving(steps, queue, store) as serving:
        reader = Reader(queue, store)
        reader.reads = False
        await reader.ask()
        steps.go(steps.count)
        await until(lambda: len(reader.frames) == WINDOW_FRAMES)
        assert serving.flows[0].sent < WINDOW_FRAMES, "the reply is still to come"
        reader.credit()
        result = await reader.end()
        assert result.frames == len(reader.frames) == WINDOW_FRAMES + 1


@pytest.mark.parametrize("meta", [EVENTS, None])
async def test_a_store_that_lost_its_last_second_gets_the_frames_of_it_again(meta: Any) -> None:
    queue, store, steps = EmbeddedQueue(), BadStore(), Steps()
    async with Serving(steps, queue, store):
        reader = await Reader(queue, store).ask(**({} if meta is None else {"meta": meta}))
        steps.go(6)
        await until(lambda: len(reader.frames) == 6)
        store.lose(reader.id, 2)
        steps.go(4)
        result = await reader.end()
        assert result.frames == 10 and b"".join(frame.data for _, frame in sorted(reader.frames.items())) == ALL
        if meta is not None:
            assert frames_of(await store.read_stream(KEYS.stream(reader.id), Place(0, 0), 64)) == list(range(1, 11))


async def test_a_run_whose_stream_another_one_has_taken_writes_nothing_more_and_stops() -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    async with Serving(steps, queue, store) as serving:
        reader = await Reader(queue, store).ask()
        steps.go(3)
        await until(lambda: len(reader.frames) == 3)
        await store.set(KEYS.owner(reader.id), Owner.new("b#2", 2, "b").to_bytes())
        steps.go(7)
        assert await within(steps.ended.is_set, 5)
        await until(serving.is_settled)
        assert len(reader.frames) == 3 and await store.get(KEYS.future(reader.id)) is None


@pytest.mark.parametrize("how", ["its reader takes nothing", "its deadline"])
async def test_a_run_whose_stream_another_one_has_taken_ends_it_for_no_reason(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a replica that was frozen, or cut off from the broker, whose reader gives its credit to the other run."""
    monkeypatch.setattr(flows, "IDLE_TIMEOUT_S", 0.3 if how == "its reader takes nothing" else 60)
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps(1000)
    async with Serving(steps, queue, store) as serving:
        reader = Reader(queue, store)
        reader.reads = False
        await reader.ask()
        steps.go(WINDOW_FRAMES)
        await until(lambda: len(reader.frames) == WINDOW_FRAMES)
        owner = Owner.new("b#2", 2, "b").to_bytes()
        await store.set(KEYS.owner(reader.id), owner)
        if how == "its deadline":
            (job,) = serving.loop._flows
            job.deadline = 0
        steps.go(1)
        assert await within(steps.ended.is_set, 5)
        await until(serving.is_settled)
        assert reader.result is None and await store.get(KEYS.future(reader.id)) is None
        assert await store.get(KEYS.owner(reader.id)) == owner and await store.last_of_stream(KEYS.stream(reader.id)) == WINDOW_FRAMES


async def test_a_run_whose_request_has_a_result_stops() -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    async with Serving(steps, queue, store) as serving:
        reader = await Reader(queue, store).ask()
        steps.go(3)
        await until(lambda: len(reader.frames) == 3)
        await store.set(KEYS.future(reader.id), b"somebody's")
        steps.go(7)
        assert await within(steps.ended.is_set, 5)
        await until(serving.is_settled)
        assert await store.get(KEYS.future(reader.id)) == b"somebody's"


async def die_in_the_middle(queue: EmbeddedQueue, store: EmbeddedStore, shown: int, on_death: str = "replay", **request: Any) -> Reader:
    """A replica shows so many chunks, and is lost."""
    steps = Steps()
    async with Serving(steps, queue, store, replica_id="b#1", on_death=on_death) as first:
        reader = await Reader(queue, store).ask(**request)
        steps.go(shown)
        await until(lambda: len(reader.frames) == shown)
        await first.loop.abandon()
        steps.go(1)
    return reader


async def test_an_answer_whose_replica_died_after_its_head_ends_with_an_error() -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    reader = await die_in_the_middle(queue, store, 4)
    async with Serving(steps, queue, store, replica_id="b#2") as second:
        result = await reader.end()
        assert result.error is not None and result.error.type == REPLICA_LOST and (result.status, result.frames) == (502, 4)
        await until(second.is_settled)
        assert not steps.runs


@pytest.mark.parametrize("reads", [False, True])
async def test_with_replay_the_handler_runs_again_and_what_was_shown_is_passed_over(reads: bool) -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    steps.reads = reads
    reader = await die_in_the_middle(queue, store, 4, meta=EVENTS)
    async with Serving(steps, queue, store, replica_id="b#2", on_death="replay") as second:
        steps.go(10)
        result = await reader.end()
        assert result.error is None and result.frames == 10 and reader.body == ALL
        assert steps.resumed == [4 if reads else 0]
        assert reader.head is not None and reader.head.replica == "b#2"  # which takes credit now
        await until(second.is_settled)
        attempts = [place.attempt for place, _ in await store.read_stream(KEYS.stream(reader.id), Place(0, 0), 64)]
        assert attempts == [1] * 4 + [2] * 6


async def lose_after_its_time(queue: EmbeddedQueue, store: EmbeddedStore, shown: int) -> Reader:
    reader = await die_in_the_middle(queue, store, shown, meta=EVENTS, timeout_s=0.3)
    await until(lambda: store.now_ms() > reader.envelope.header.deadline)
    return reader


async def test_an_answer_is_replayed_though_its_request_timeout_has_passed() -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    reader = await lose_after_its_time(queue, store, 4)
    async with Serving(steps, queue, store, replica_id="b#2", on_death="replay") as second:
        steps.go(10)
        result = await reader.end()
        assert result.error is None and result.frames == 10 and reader.body == ALL
        await until(second.is_settled)


async def test_an_answer_that_is_not_replayed_ends_as_lost_though_its_request_timeout_has_passed() -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    reader = await lose_after_its_time(queue, store, 4)
    async with Serving(steps, queue, store, replica_id="b#2"):
        result = await reader.end()
        assert result.error is not None and result.error.type == REPLICA_LOST and result.frames == 4 and not steps.runs


async def test_an_answer_that_began_before_on_death_was_set_to_replay_ends_as_lost() -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    reader = await die_in_the_middle(queue, store, 4, on_death="fail")
    async with Serving(steps, queue, store, replica_id="b#2", on_death="replay"):
        result = await reader.end()
        assert result.error is not None and result.error.type == REPLICA_LOST and result.frames == 4 and not steps.runs


async def test_a_request_that_showed_nothing_in_its_time_is_late_and_not_run_again() -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    reader = await lose_after_its_time(queue, store, 0)
    async with Serving(steps, queue, store, replica_id="b#2", on_death="replay") as second:
        result = await reader.end()
        assert result.outcome is Outcome.LATE and not steps.runs
        await until(second.is_settled)


async def test_two_copies_of_a_request_that_come_again_together_are_run_one_after_the_other() -> None:
    queue, store, steps, again = EmbeddedQueue(), SlowStore(), Steps(), Steps(200)
    async with Serving(steps, queue, store, on_death="replay") as first:
        reader = await Reader(queue, store).ask(meta=EVENTS)
        steps.go(4)
        await until(lambda: len(reader.frames) == 4)
        copy = msgspec.structs.replace(reader.envelope, header=msgspec.structs.replace(reader.envelope.header, again=True))
        assert await publish(queue, copy) is None
        await until(lambda: first.loop.running == 2)  # it is given back, again and again
        await first.loop.abandon()
        steps.go(1)
    async with Serving(again, queue, store, replica_id="b#2", on_death="replay", sync_threads=2) as second:
        again.go(200)  # more than a window: the stream needs the credit of its reader
        result = await reader.end()
        assert result.error is None and result.frames == 200 and again.runs == 1
        await until(second.is_settled)


async def test_an_answer_that_was_shown_in_part_and_is_replayed_in_one_piece_ends_with_an_error() -> None:
    queue, store = EmbeddedQueue(), EmbeddedStore()
    reader = await die_in_the_middle(queue, store, 4)

    def handler(request: Any) -> str:
        return "all of it"

    async with Serving(handler, queue, store, replica_id="b#2", on_death="replay"):
        result = await reader.end()
        assert result.error is not None and "in one piece" in result.error.message and (result.status, result.frames) == (500, 4)


@pytest.mark.parametrize("yielded", [0, 2])
async def test_a_replay_that_ends_before_what_was_shown_fails(yielded: int) -> None:
    async def shorter(request: Any) -> AsyncIterator[str]:
        for number in range(yielded):
            yield str(number)

    queue, store = EmbeddedQueue(), EmbeddedStore()
    reader = await die_in_the_middle(queue, store, 4, meta=EVENTS)
    async with Serving(shorter, queue, store, replica_id="b#2", on_death="replay"):
        result = await reader.end()
        assert result.error is not None and "ended before" in result.error.message and result.frames == 4


async def test_an_answer_whose_replica_died_before_its_head_is_made_again_unseen() -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    reader = await die_in_the_middle(queue, store, 0)
    async with Serving(steps, queue, store, replica_id="b#2"):
        steps.go(10)
        result = await reader.end()
        assert result.error is None and reader.body == ALL and steps.runs == 1


async def test_a_second_copy_of_a_request_whose_answer_flows_is_dropped() -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    async with Serving(steps, queue, store, max_concurrent_queries=1) as first, Serving(steps, queue, store, replica_id="b#2") as second:
        reader = await Reader(queue, store).ask()
        steps.go(4)
        await until(lambda: len(reader.frames) == 4)
        copy = msgspec.structs.replace(reader.envelope, header=msgspec.structs.replace(reader.envelope.header, again=True))
        assert await publish(queue, copy) is None

        async def is_dropped() -> bool:
            return not await queue.depth("b", 1) and first.loop.running + second.loop.running == 1

        await until(is_dropped)
        steps.go(6)
        result = await reader.end()
        assert result.error is None and reader.body == ALL and steps.runs == 1


async def test_a_stream_that_was_long_and_is_given_up_does_not_count_as_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stuck, "STUCK_AFTER_S", 1.0)
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    async with Serving(steps, queue, store, request_timeout_s=0.1) as serving:
        reader = await Reader(queue, store).ask()
        steps.go(2)
        await until(lambda: len(reader.frames) == 2)
        await asyncio.sleep(1.3)
        await store.append_log(KEYS.cancelled, notice_of_request(reader.id))
        await until(lambda: reader.result is not None)
        stuck.check_calls("b", serving.loop._register, 0.1)
        steps.go(1)
        await until(serving.is_settled)


async def test_a_replica_that_drains_ends_what_does_not_end_by_itself() -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    async with Serving(steps, queue, store, graceful_shutdown_timeout_s=0.2) as serving:
        reader = await Reader(queue, store).ask()
        steps.go(4)
        await until(lambda: len(reader.frames) == 4)
        await serving.loop.drain(10)
        result = await reader.end()
        assert result.error is not None and result.error.type == REPLICA_LOST and result.frames == 4
        steps.go(1)


@pytest.mark.parametrize("reads", [False, True])
async def test_the_head_of_events_comes_by_itself_if_the_first_one_takes_long(reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "HEAD_AFTER_S", 0.2)
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    async with Serving(steps, queue, store, on_death="replay") as first:
        reader = await Reader(queue, store).ask(meta=EVENTS)
        await until(lambda: reader.head is not None and len(reader.frames) == 1 and not reader.size)
        steps.go(3)
        await until(lambda: reader.body == b"0 1 2 ")
        await first.loop.abandon()
        steps.go(1)
    again = Steps()
    again.reads = reads
    async with Serving(again, queue, store, replica_id="b#2", on_death="replay") as second:
        again.go(2 if reads else 5)
        await until(lambda: reader.body == b"0 1 2 3 4 ")
        assert again.resumed == [3 if reads else 0]
        await second.loop.abandon()
        again.go(1)
    once_more = Steps()
    once_more.reads = reads
    async with Serving(once_more, queue, store, replica_id="b#3", on_death="replay"):
        once_more.go(10)
        result = await reader.end()
        assert reader.body == ALL and result.frames == 11 and once_more.resumed == [5 if reads else 0]


async def test_a_head_that_came_by_itself_before_an_empty_event_is_passed_over_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "HEAD_AFTER_S", 0.2)
    queue, store = EmbeddedQueue(), EmbeddedStore()
    let = threading.Semaphore(0)

    def handler(request: Any) -> Iterator[str]:
        for item in ("", "a", "b", "c"):
            assert let.acquire(timeout=30)
            yield item

    async with Serving(handler, queue, store, on_death="replay") as first:
        reader = await Reader(queue, store).ask(meta=EVENTS)
        await until(lambda: len(reader.frames) == 1)
        let.release(2)
        await until(lambda: reader.body == b"a")
        await first.loop.abandon()
        let.release()
    async with Serving(handler, queue, store, replica_id="b#2", on_death="replay"):
        let.release(20)  # the first one may take some
        await reader.end()
        assert reader.body == b"abc"


class BrokenQueue(EmbeddedQueue):
    """Says of every reply at once that it was not delivered, as if there were no connection."""

    def __init__(self) -> None:
        super().__init__()
        self.chunks: list[int] = []

    def reply(self, envelope: Envelope, reply_to: str, settled: Settled) -> None:
        if isinstance(envelope, StreamReply) and not envelope.ends:
            self.chunks.append(envelope.seq)
        settled(BrokerUnavailable("there is no connection"))


async def test_a_streamed_reply_ends_with_its_first_chunk_that_is_not_delivered(caplog: pytest.LogCaptureFixture) -> None:
    queue, store = BrokenQueue(), EmbeddedStore()
    began, let, made = threading.Event(), threading.Event(), threading.Event()

    async def handler(request: Any) -> AsyncIterator[str]:
        began.set()
        let.wait(10)
        for number in range(10):
            yield str(number)
        made.set()

    async with Serving(handler, queue, store) as serving:
        assert await publish(queue, Envelope("question", b"", "text/plain", reply_to="caller")) is None
        await until(began.is_set)
        let.set()
        assert made.wait(10)  # blocks this loop, too, so that all chunks are found at once
        await until(lambda: queue.chunks and not len(serving.loop._flows._replies))
        assert queue.chunks == [1] and not [record for record in caplog.records if record.exc_info]


# Readers.


def leave(reader: Reader) -> None:
    reader.credit(left=True)


async def test_a_resumable_stream_pauses_without_a_reader_and_goes_on_with_the_next_one() -> None:
    queue, store = EmbeddedQueue(), EmbeddedStore()
    made: list[int] = []

    async def handler(request: Any) -> AsyncIterator[str]:
        for number in range(300):
            made.append(number)
            yield f"{number} "
            await asyncio.sleep(0.001)

    async with Serving(handler, queue, store):
        reader = await Reader(queue, store).ask(meta=EVENTS)
        await until(lambda: len(reader.frames) > 20)
        reader.reads = False
        leave(reader)
        await asyncio.sleep(0.1)
        paused_at = len(made)
        await asyncio.sleep(0.1)
        assert len(made) == paused_at < 300
        second = Reader(queue, store, "second")
        second.id = reader.id
        seen = len(reader.frames)
        assert reader.head is not None
        store.post(KEYS.feed(reader.head.replica), Credit(1, reader.id, second.inbox, seen, 0).to_bytes())

        def credit() -> None:
            assert reader.head is not None
            taken = seen + len(second.frames)
            store.post(KEYS.feed(reader.head.replica), Credit(1, reader.id, second.inbox, taken, 0, False, True).to_bytes())

        while second.result is None:
            credit()
            await asyncio.sleep(0.005)
        assert second.result.frames == 300 and len(made) == 300
        entries = await store.read_stream(KEYS.stream(reader.id), Place(0, 0), 1000)
        assert frames_of(entries) == list(range(1, 301))


async def test_a_resumable_stream_to_which_nobody_comes_back_is_cancelled_after_its_grace() -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    async with Serving(steps, queue, store, resume_grace_s=0.2) as serving:
        reader = await Reader(queue, store).ask(meta=EVENTS)
        steps.go(2)
        await until(lambda: len(reader.frames) == 2)
        (flow,) = serving.flows
        leave(reader)
        await until(lambda: flow.paused)
        steps.go(1)
        result = await reader.end()
        assert result.status == 499 and result.frames >= 2
        assert await within(steps.ended.is_set, 5)
        await until(serving.is_settled)


@pytest.mark.parametrize("meta", [EVENTS, None])
async def test_the_death_of_a_proxy_pauses_its_resumable_streams_and_cancels_the_others(meta: Any) -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    async with Serving(steps, queue, store) as serving:
        reader = await Reader(queue, store).ask(**({} if meta is None else {"meta": meta}))
        steps.go(2)
        await until(lambda: len(reader.frames) == 2)
        await store.append_log(KEYS.cancelled, notice_of_proxy(reader.inbox))
        steps.go(1)
        if meta is None:
            assert await within(steps.ended.is_set, 5)
            await until(serving.is_settled)
        else:
            (flow,) = serving.flows
            assert flow.paused and reader.result is None
            steps.go(10)


@pytest.mark.parametrize("meta", [EVENTS, None])
async def test_a_reader_that_has_frames_and_takes_none_counts_as_gone(meta: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "IDLE_TIMEOUT_S", 0.3)
    queue, store = EmbeddedQueue(), EmbeddedStore()
    ended = threading.Event()

    def handler(request: Any) -> Iterator[str]:
        try:
            while True:
                yield "x"
        finally:
            ended.set()

    async with Serving(handler, queue, store, resume_grace_s=0.1) as serving:
        reader = Reader(queue, store)
        reader.reads = False
        await reader.ask(**({} if meta is None else {"meta": meta}))
        await until(lambda: len(reader.frames) == WINDOW_FRAMES)
        assert await within(ended.is_set, 5)
        await until(serving.is_settled)


async def test_a_handler_that_is_silent_for_too_long_after_its_head_is_late() -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    async with Serving(steps, queue, store, stream_idle_timeout_s=0.2) as serving:
        reader = await Reader(queue, store).ask()
        steps.go(2)
        result = await reader.end()
        assert result.status == 504 and result.frames == 2
        assert result.error is not None and "stream_idle_timeout_s" in result.error.message
        steps.go(1)
        assert await within(steps.ended.is_set, 5)
        await until(serving.is_settled)


async def test_a_stream_may_take_longer_than_its_request_has_to_begin() -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    async with Serving(steps, queue, store):
        reader = await Reader(queue, store).ask(timeout_s=0.4)
        steps.go(2)
        await until(lambda: len(reader.frames) == 2)
        await asyncio.sleep(0.6)
        steps.go(8)
        result = await reader.end()
        assert result.error is None and reader.body == ALL


async def test_a_request_whose_head_is_late_is_late() -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    async with Serving(steps, queue, store) as serving:
        reader = await Reader(queue, store).ask(timeout_s=0.3)
        result = await reader.end()
        assert result.status == 504 and not result.frames
        steps.go(1)
        await until(serving.is_settled)
        assert not reader.frames


async def test_credit_that_names_another_inbox_than_one_of_the_namespace_is_not_believed() -> None:
    queue, store, steps = EmbeddedQueue(), EmbeddedStore(), Steps()
    async with Serving(steps, queue, store) as serving:
        reader = await Reader(queue, store).ask()
        steps.go(2)
        await until(lambda: len(reader.frames) == 2)
        assert reader.head is not None
        for raw in (Credit(1, reader.id, "mqserve:others:inbox:x", 2, 0).to_bytes(), b"nonsense", b""):
            store.post(KEYS.feed(reader.head.replica), raw)
        (flow,) = serving.flows
        assert flow.inbox == reader.inbox
        steps.go(8)
        assert (await reader.end()).error is None


async def test_of_a_resumable_stream_no_more_is_kept_than_is_settled() -> None:
    queue, store = EmbeddedQueue(), EmbeddedStore()

    async def handler(request: Any) -> AsyncIterator[str]:
        for number in range(500):
            yield f"{number} "
            await asyncio.sleep(0)

    async with Serving(handler, queue, store, stream_kept_frames=100):
        reader = await Reader(queue, store).ask(meta=EVENTS)
        await reader.end()
        assert len(reader.frames) == 500
        kept = frames_of(await store.read_stream(KEYS.stream(reader.id), Place(0, 0), 1000))
        assert kept[-1] == 500 and 100 <= len(kept) <= 100 + 2 * WINDOW_FRAMES
