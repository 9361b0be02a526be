"""The replica's side of streamed answers: what generators yield comes to a reader, in order and as it is made."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from sse_starlette import EventSourceResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, StreamingResponse

import mqserve as serve
from mqserve.broker.calls.cancellations import notice_of_request
from mqserve.broker.envelope import RequestHead
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.redis.store import open_redis
from mqserve.broker.results import Result
from mqserve.broker.store import Place as StreamPlace
from mqserve.broker.store import Store
from mqserve.broker.streams import WINDOW_BYTES, WINDOW_FRAMES, Form
from mqserve.broker.values.codecs import decode_plain
from mqserve.replicas import outgoing
from tests.broker.traffic import until
from tests.replicas.streaming import EVENTS, KEYS, Reader, Serving, within

pytestmark = pytest.mark.anyio


@pytest.fixture
def each_chunk_is_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are joined by chance of time: for tests that count frames."""
    monkeypatch.setattr(outgoing, "JOINED_BYTES", 0)


class Place:
    """A broker and a store, and what is beside them."""

    def __init__(self, store: Store) -> None:
        self.queue, self.store = EmbeddedQueue(), store

    def serve(self, target: Any, **config: Any) -> Serving:
        return Serving(target, self.queue, self.store, **config)

    def reader(self, name: str = "reader") -> Reader:
        return Reader(self.queue, self.store, name)

    async def cancel(self, reader: Reader) -> None:
        await self.store.append_log(KEYS.cancelled, notice_of_request(reader.id))

    async def result(self, reader: Reader) -> Result | None:
        """What the store has of a direct publisher's request."""
        raw = await self.store.get(KEYS.future(f"b/{reader.id}"))
        return None if raw is None else Result.from_bytes(raw)


@pytest.fixture(params=["embedded", "distributed"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """In the distributed form the store is a real one."""
    if request.param == "embedded":
        yield Place(EmbeddedStore())
        return
    async with open_redis(request.getfixturevalue("store_url"), "tests") as redis:
        yield Place(redis)


def counts(request: Any) -> Iterator[str]:
    for number in range(5):
        yield f"{number} "


async def counts_async(request: Any) -> AsyncIterator[str]:
    for number in range(5):
        await asyncio.sleep(0)
        yield f"{number} "


async def returns_one(request: Any) -> AsyncIterator[str]:
    return counts_async(request)


@pytest.mark.parametrize("handler", [counts, counts_async, returns_one, lambda request: counts(request)])
@pytest.mark.parametrize("config", [{}, {"sync_threads": 3}])
async def test_the_chunks_of_a_generator_come_in_order_and_then_the_end(place: Place, handler: Any, config: dict[str, Any]) -> None:
    async with place.serve(handler, **config) as serving:
        reader = await place.reader().ask()
        result = await reader.end()
        assert reader.body == b"0 1 2 3 4 " and 1 <= result.frames <= 5 and result.error is None and not result.body
        assert reader.head is not None
        assert reader.head.content_type == "text/plain; charset=utf-8" and reader.head.form is Form.BODY and not reader.head.resumable
        await until(serving.is_settled)


async def test_the_first_chunk_is_there_before_the_second_is_made(place: Place) -> None:
    go_on = threading.Event()

    def handler(request: Any) -> Iterator[str]:
        yield "first"
        assert go_on.wait(30)
        yield "second"

    async with place.serve(handler):
        reader = await place.reader().ask()
        await until(lambda: reader.body == b"first")
        go_on.set()
        await reader.end()
        assert reader.body == b"firstsecond"


async def test_events_are_one_chunk_an_item(place: Place) -> None:
    def handler(request: Any) -> Iterator[Any]:
        yield from ["", "text", {"a": 1}, b"bytes", None]

    async with place.serve(handler):
        reader = await place.reader().ask(meta=EVENTS)
        await reader.end()
        assert reader.head is not None and reader.head.form is Form.ITEMS and reader.head.resumable
        assert [frame.data for _, frame in sorted(reader.frames.items())] == [b"", b"text", b'{"a":1}', b"bytes", b"null"]


class Counted:
    """Counts what a generator has made, and notes whether its `finally` has run, and in which thread."""

    def __init__(self, chunk: bytes = b"x", pause_s: float = 0) -> None:
        self.chunk, self.pause_s = chunk, pause_s
        self.made = 0
        self.ended = threading.Event()
        self.threads: set[int] = set()
        self.saw_cancelled = False

    def plain(self, request: Any) -> Iterator[bytes]:
        try:
            while True:
                self.threads.add(threading.get_ident())
                self.made += 1
                time.sleep(self.pause_s)
                yield self.chunk
        finally:
            self.threads.add(threading.get_ident())
            self.saw_cancelled = serve.cancelled()
            self.ended.set()

    async def asynchronous(self, request: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                self.made += 1
                await asyncio.sleep(self.pause_s)
                yield self.chunk
        finally:
            self.saw_cancelled = serve.cancelled()
            self.ended.set()

    def response(self, request: Any) -> StreamingResponse:
        return StreamingResponse(self.asynchronous(request))


KINDS = ["plain", "asynchronous", "response"]


async def ends_soon(counted: Counted) -> None:
    assert await within(counted.ended.is_set, 5)
    assert counted.saw_cancelled


async def one_that_takes_nothing(place: Place, counted: Counted, at_most: int) -> Reader:
    """A reader that has a full window, and the generator stands still behind so many chunks at most."""
    reader = place.reader()
    reader.reads = False
    await reader.ask()
    await until(lambda: len(reader.frames) == WINDOW_FRAMES)
    made = counted.made
    await asyncio.sleep(0.2)
    assert counted.made == made <= at_most and len(reader.frames) == WINDOW_FRAMES
    return reader


@pytest.mark.usefixtures("each_chunk_is_a_frame")
@pytest.mark.parametrize("kind", KINDS)
async def test_a_reader_that_takes_nothing_stops_the_generator_at_the_window(place: Place, kind: str) -> None:
    counted = Counted()
    async with place.serve(getattr(counted, kind)) as serving:
        reader = await one_that_takes_nothing(place, counted, WINDOW_FRAMES + 1)
        reader.credit(10)
        await until(lambda: len(reader.frames) == WINDOW_FRAMES + 10)
        await place.cancel(reader)
        await ends_soon(counted)
        await until(serving.is_settled)


@pytest.mark.parametrize("kind", KINDS)
async def test_large_chunks_stop_at_the_window_of_bytes(place: Place, kind: str) -> None:
    counted = Counted(b"x" * 300_000)
    async with place.serve(getattr(counted, kind)):
        reader = place.reader()
        reader.reads = False
        await reader.ask()
        await until(lambda: reader.size > WINDOW_BYTES - 300_000)
        await asyncio.sleep(0.1)
        assert reader.size <= WINDOW_BYTES and counted.made <= 5
        reader.reads = True
        reader.credit()
        await until(lambda: reader.size > 5 * WINDOW_BYTES)
        await place.cancel(reader)
        await ends_soon(counted)


@pytest.mark.parametrize("kind", KINDS)
async def test_small_chunks_of_a_body_that_come_fast_travel_together_and_stop_at_the_window(place: Place, kind: str) -> None:
    counted = Counted()
    async with place.serve(getattr(counted, kind)) as serving:
        reader = await one_that_takes_nothing(place, counted, WINDOW_FRAMES * (WINDOW_FRAMES + 1))
        reader.reads = True
        reader.credit()
        await until(lambda: reader.size > 20 * WINDOW_FRAMES)
        assert len(reader.frames) < reader.size
        await place.cancel(reader)
        await ends_soon(counted)
        await until(serving.is_settled)


@pytest.mark.parametrize("config", [{"on_death": "replay"}, {}])
async def test_chunks_that_are_counted_are_never_joined(place: Place, config: dict[str, Any]) -> None:
    def handler(request: Any) -> Iterator[str]:
        for number in range(500):
            yield f"{number} "

    async with place.serve(handler, **config):
        reader = await place.reader().ask(meta=RequestHead() if config else EVENTS)
        assert (await reader.end()).frames == 500


async def test_one_chunk_larger_than_the_window_comes_whole(place: Place) -> None:
    def handler(request: Any) -> Iterator[bytes]:
        yield bytes(range(256)) * 4096 * 5
        yield b"end"

    async with place.serve(handler):
        reader = await place.reader().ask()
        await reader.end()
        assert reader.body == bytes(range(256)) * 4096 * 5 + b"end"


@pytest.mark.parametrize("config", [{}, {"sync_threads": 2}])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_cancelled_generator_runs_its_finally_within_a_second_and_frees_its_place(
    place: Place, kind: str, config: dict[str, Any]
) -> None:
    counted = Counted(pause_s=0.02)
    async with place.serve(getattr(counted, kind), **config) as serving:
        reader = await place.reader().ask()
        await until(lambda: len(reader.frames) > 3)
        await place.cancel(reader)
        await ends_soon(counted)
        await until(serving.is_settled)
        assert not await place.store.last_of_stream(KEYS.stream(reader.id)) and not await place.store.get(KEYS.owner(reader.id))


@pytest.mark.usefixtures("each_chunk_is_a_frame")
async def test_a_plain_generator_that_an_async_handler_returned_is_closed_though_its_reader_takes_nothing(place: Place) -> None:
    counted = Counted()

    async def handler(request: Any) -> Iterator[bytes]:
        return counted.plain(request)

    async with place.serve(handler) as serving:
        reader = place.reader()
        reader.reads = False
        await reader.ask()
        await until(lambda: len(reader.frames) == WINDOW_FRAMES)
        await place.cancel(reader)
        await ends_soon(counted)
        await until(serving.is_settled)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sync_threads", [1, 2])
async def test_what_a_call_returns_after_it_was_given_up_does_not_run(place: Place, kind: str, sync_threads: int) -> None:
    counted = Counted()
    began = threading.Event()

    def handler(request: Any) -> Any:
        began.set()
        while not serve.cancelled():
            time.sleep(0.01)
        time.sleep(0.1)  # so long that the cancellation finds nothing but this call
        return getattr(counted, kind)(request)

    async with place.serve(handler, sync_threads=sync_threads) as serving:
        reader = await place.reader().ask()
        await until(began.is_set)
        await place.cancel(reader)
        await until(serving.is_settled)
        assert not counted.made


async def test_a_plain_generator_that_blocks_is_closed_after_its_step_in_its_own_thread(place: Place) -> None:
    counted = Counted(pause_s=0.5)
    async with place.serve(counted.plain) as serving:
        reader = await place.reader().ask()
        await until(lambda: len(reader.frames) == 1)
        await place.cancel(reader)
        await ends_soon(counted)
        assert len(counted.threads) == 1
        await until(serving.is_settled)


@pytest.mark.parametrize("is_async", [False, True])
async def test_an_error_after_the_first_chunk_ends_the_stream_with_it(place: Place, is_async: bool) -> None:
    def plain(request: Any) -> Iterator[str]:
        yield "one"
        raise ValueError("odd")

    async def asynchronous(request: Any) -> AsyncIterator[str]:
        yield "one"
        raise ValueError("odd")

    async with place.serve(asynchronous if is_async else plain) as serving:
        reader = await place.reader().ask()
        result = await reader.end()
        assert reader.body == b"one" and result.frames == 1 and result.status == 500
        assert result.error is not None and result.error.message == "odd"
        await until(serving.is_settled)


async def test_an_error_before_the_first_chunk_is_an_answer_in_one_piece(place: Place) -> None:
    def handler(request: Any) -> Iterator[str]:
        if not request.data:
            raise HTTPException(404, "none here")
        yield request.data

    async with place.serve(handler):
        reader = await place.reader().ask()
        result = await reader.end()
        assert result.status == 404 and not result.frames and not reader.frames


async def test_a_generator_without_chunks_is_an_empty_answer(place: Place) -> None:
    def handler(request: Any) -> Iterator[str]:
        yield from ()

    async with place.serve(handler):
        result = await (await place.reader().ask()).end()
        assert result.status == 200 and not result.body and not result.frames
        events = await place.reader("events").ask(meta=EVENTS)
        assert (await events.end()).frames == 1 and events.head is not None and not events.size
        values = await place.reader("values").ask(origin="handle", stream=1)
        assert (await values.end()).frames == 1 and values.head is not None


@pytest.mark.parametrize(
    ("values", "content_type", "body"),
    [
        ([b"a", "b", bytearray(b"c")], "application/octet-stream", b"abc"),
        (["a", b"b", ""], "text/plain; charset=utf-8", b"ab"),
        ([{"a": 1}, "text", None], "application/x-ndjson", b'{"a":1}\n"text"\nnull\n'),
    ],
)
async def test_the_first_chunk_decides_what_the_body_is(place: Place, values: list[Any], content_type: str, body: bytes) -> None:
    async with place.serve(lambda request: (value for value in values)):
        reader = await place.reader().ask()
        await reader.end()
        assert reader.head is not None and (reader.head.content_type, reader.body) == (content_type, body)
        direct = place.reader("direct")
        await direct.ask(origin="", inbox="")
        await until(lambda: place.result(direct))
        result = await place.result(direct)
        assert result is not None and result.body == body and result.content_type == content_type  # in one piece


async def test_a_chunk_that_does_not_fit_the_body_is_an_error_that_says_so(place: Place) -> None:
    async with place.serve(lambda request: (value for value in ["text", 1])):
        result = await (await place.reader().ask()).end()
        assert result.frames == 1 and result.error is not None and "yield only str and bytes" in result.error.message


async def test_a_handle_that_takes_chunks_gets_values_and_any_other_a_list(place: Place) -> None:
    async with place.serve(lambda request: (value for value in [1, "two", {"three": 3}])):
        stream = await place.reader("stream").ask(origin="handle", stream=2)
        await stream.end()
        assert stream.values == [1, "two", {"three": 3}] and stream.head is not None and stream.head.resumable
        whole = await place.reader("whole").ask(origin="handle")
        result = await whole.end()
        assert decode_plain(result.body, result.content_type) == [1, "two", {"three": 3}] and not whole.frames


async def test_an_answer_to_head_has_the_head_alone(place: Place) -> None:
    counted = Counted()
    async with place.serve(counted.plain) as serving:
        result = await (await place.reader().ask(meta=RequestHead(method="HEAD"))).end()
        assert (result.content_type, result.body, result.frames) == ("application/octet-stream", b"", 0)
        assert counted.ended.is_set() and counted.made == 1
        await until(serving.is_settled)
    endless = Counted()
    async with place.serve(endless.response):
        result = await (await place.reader("other").ask(meta=RequestHead(method="HEAD"))).end()
        assert result.status == 200 and not result.body and not result.frames
        assert await within(endless.ended.is_set, 5)


async def test_a_streaming_response_streams_with_its_head_and_runs_its_background_task(place: Place) -> None:
    ran = threading.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"12"
        yield b"34"

    def handler(request: Any) -> StreamingResponse:
        headers = {"content-length": "4", "x-of": "ours"}
        return StreamingResponse(body(), 201, headers, "text/odd", background=BackgroundTask(ran.set))

    async with place.serve(handler):
        reader = await place.reader().ask()
        result = await reader.end()
        assert reader.body == b"1234" and result.error is None and 1 <= result.frames <= 2
        assert reader.head is not None and reader.head.length == 4 and reader.head.status == 201
        assert reader.head.content_type == "text/odd; charset=utf-8" and (b"x-of", b"ours") in reader.head.headers
        assert await within(ran.is_set, 5)


async def test_an_event_source_response_of_sse_starlette_streams_as_it_is(place: Place) -> None:
    go_on = threading.Event()

    async def events() -> AsyncIterator[dict[str, str]]:
        yield {"data": "first"}
        await asyncio.to_thread(go_on.wait, 30)
        yield {"data": "second"}

    async with place.serve(lambda request: EventSourceResponse(events())) as serving:
        reader = await place.reader().ask(meta=EVENTS)
        await until(lambda: reader.body == b"data: first\r\n\r\n")
        assert reader.head is not None and reader.head.form is Form.BODY and not reader.head.resumable
        go_on.set()
        await reader.end()
        assert reader.body == b"data: first\r\n\r\ndata: second\r\n\r\n"
        await until(lambda: not serving.worker.responding)


@pytest.mark.parametrize("length", ["3", "5"])
async def test_a_response_with_another_length_than_it_says_fails(place: Place, length: str) -> None:
    async with place.serve(lambda request: StreamingResponse(iter([b"12", b"34"]), headers={"content-length": length})):
        result = await (await place.reader().ask()).end()
        assert result.error is not None and "Content-Length" in result.error.message


async def test_a_file_is_streamed_and_a_small_one_comes_in_one_piece(place: Place, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1_000_000))
    (tmp_path / "small").write_bytes(b"small")
    async with place.serve(lambda request: FileResponse(tmp_path / request.data)) as serving:
        large = await place.reader("large").ask(b"large")
        await large.end()
        assert large.body == bytes(1_000_000) and large.head is not None and large.head.length == 1_000_000
        small = await (await place.reader("small").ask(b"small")).end()
        assert small.body == b"small" and not small.frames
        await until(lambda: not serving.worker.responding)  # the files are closed


async def test_32_mib_to_a_slow_reader_are_never_held_here(place: Place) -> None:
    def handler(request: Any) -> Iterator[bytes]:
        for _ in range(512):
            yield bytes(65_536)

    async with place.serve(handler) as serving:
        reader = await place.reader().ask()
        most = 0
        while reader.result is None:
            most = max(most, sum(flow.held_bytes for flow in serving.flows))
            await asyncio.sleep(0)
        assert reader.size == 32 * 1024 * 1024 and most < 3 * WINDOW_BYTES
        assert len(await place.store.read_stream(KEYS.stream(reader.id), StreamPlace(0, 0), 1000)) <= WINDOW_FRAMES


# Batches.


async def test_a_batch_handler_that_yields_lists_streams_an_item_to_each_member(place: Place) -> None:
    @serve.accept_batch
    def plain(requests: list[Any]) -> Iterator[list[Any]]:
        counts = [int(request.data) for request in requests]
        for step in range(max(counts)):
            yield [f"{count}:{step} " if step < count else serve.END for count in counts]

    @serve.accept_batch
    async def asynchronous(requests: list[Any]) -> AsyncIterator[list[Any]]:
        for items in plain(requests):
            await asyncio.sleep(0)
            yield items

    for number, handler in enumerate((plain, asynchronous)):
        async with place.serve(handler, max_batch_size=3, batch_wait_timeout=10) as serving:
            readers = [place.reader(f"{number}{count}") for count in (1, 3, 2)]
            for reader, count in zip(readers, (b"1", b"3", b"2"), strict=True):
                await reader.ask(count)
            results = [await reader.end() for reader in readers]
            assert [reader.body for reader in readers] == [b"1:0 ", b"3:0 3:1 3:2 ", b"2:0 2:1 "]
            assert not any(result.error for result in results)
            await until(serving.is_settled)


async def test_an_error_of_a_batch_fails_its_members_that_have_not_ended(place: Place) -> None:
    @serve.accept_batch
    def handler(requests: list[Any]) -> Iterator[list[Any]]:
        yield ["a"] * len(requests)
        yield [serve.END, "b"]
        raise ValueError("odd")

    async with place.serve(handler, max_batch_size=2, batch_wait_timeout=10):
        first, second = await place.reader("first").ask(), await place.reader("second").ask()
        assert (await first.end()).error is None and first.body == b"a"
        failed = await second.end()
        assert failed.error is not None and failed.error.message == "odd" and second.body == b"ab"


async def test_a_batch_that_yields_too_few_items_fails_and_says_so(place: Place) -> None:
    @serve.accept_batch
    def handler(requests: list[Any]) -> Iterator[list[Any]]:
        yield ["one"]

    async with place.serve(handler, max_batch_size=2, batch_wait_timeout=10):
        readers = [await place.reader("first").ask(), await place.reader("second").ask()]
        results = [await reader.end() for reader in readers]
        assert all(result.error is not None and "yielded 1 results; yield one" in result.error.message for result in results)


async def test_an_iterator_that_a_handler_returns_is_refused_and_told_to_be_yielded(place: Place) -> None:
    async with place.serve(lambda request: map(str, range(3))):
        result = await (await place.reader().ask()).end()
        assert result.error is not None and "or yield the values" in result.error.message


@pytest.mark.usefixtures("each_chunk_is_a_frame")
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_member_that_leaves_a_batch_stops_no_other_and_the_last_one_ends_it(place: Place, is_async: bool) -> None:
    ended = threading.Event()

    @serve.accept_batch
    def plain(requests: list[Any]) -> Iterator[list[Any]]:
        try:
            while True:
                yield ["x"] * len(requests)
        finally:
            ended.set()

    @serve.accept_batch
    async def asynchronous(requests: list[Any]) -> AsyncIterator[list[Any]]:
        for items in plain(requests):
            yield items
            await asyncio.sleep(0)

    async with place.serve(asynchronous if is_async else plain, max_batch_size=2, batch_wait_timeout=10) as serving:
        first, second = place.reader("first"), place.reader("second")
        first.reads = False
        await first.ask()
        await second.ask()
        await until(lambda: len(second.frames) == len(first.frames) == WINDOW_FRAMES)  # the slower one sets the pace
        await place.cancel(first)
        await until(lambda: len(second.frames) > 3 * WINDOW_FRAMES)
        await place.cancel(second)
        assert is_async or await within(ended.is_set, 5)
        await until(serving.is_settled)
