"""Handlers that yield, and handles that read them value by value. In both forms."""

import asyncio
import contextlib
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import mqserve as serve
from mqserve.broker.calls import incoming_streams
from mqserve.broker.streams import IDLE_TIMEOUT_S
from mqserve.replicas import flows
from tests.children import MANY_THREADS, in_a_child
from tests.gates import Gate
from tests.instances import Deploy, distributed_only, wait_until
from tests.tallies import Tally

embedded_only = pytest.mark.parametrize("form", ["embedded"], indirect=True)
WITHIN_S = 20.0  # a machine that is busy with other tests needs more than the second that is promised

Handler = Callable[[Any], Any]


class TooMany(Exception):
    """An exception of the user's own."""


class Picture:
    """A value that only a pickle carries."""

    def __init__(self, pixels: bytes) -> None:
        self.pixels = pixels

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and other.pixels == self.pixels

    __hash__ = None  # type: ignore[assignment]


class Counter:
    """Yields as many numbers as it is told to."""

    def __call__(self, request: serve.ServeRequest) -> Iterator[int]:
        yield from range(request.data)

    async def slowly(self, request: serve.ServeRequest) -> AsyncIterator[int]:
        for number in range(request.data):
            yield number
            await asyncio.sleep(0)

    def fail(self, request: serve.ServeRequest) -> Iterator[int]:
        yield from range(request.data)
        raise TooMany(f"no more than {request.data}")

    def fail_at_once(self, request: serve.ServeRequest) -> Iterator[int]:
        if request.data is None:
            raise TooMany("none at all")
        yield request.data

    def nothing(self, request: serve.ServeRequest) -> Iterator[int]:
        yield from ()

    def large(self, request: serve.ServeRequest) -> Iterator[bytes]:
        yield bytes(request.data)
        yield b"end"

    def objects(self, request: serve.ServeRequest) -> Iterator[Any]:
        yield from (None, "", b"", "text", b"bytes", {1, 2}, [1, 2.5], Picture(b"\x00" * 200_000))

    def in_one_piece(self, request: serve.ServeRequest) -> int:
        return 3

    def returned(self, request: serve.ServeRequest) -> Iterator[int]:
        return (2 * number for number in range(request.data))


@pytest.fixture(scope="module")
def counter(client: serve.Client) -> Iterator[str]:
    """The endpoint of a Counter."""
    deploy = Deploy(client)
    yield deploy(Counter)
    deploy.undo()


def endless(tally: Tally) -> Handler:
    """Yields for ever, and notes its end."""

    async def count(request: Any) -> AsyncIterator[int]:
        try:
            number = 0
            while True:
                yield number
                number += 1
                await asyncio.sleep(0.001)
        finally:
            tally.note("ended")

    return count


ENDED = """
import asyncio

import mqserve as serve


async def count(request):
    while True:
        yield 1
        await asyncio.sleep(0.01)


with serve.start(http_options={"location": None}):
    with serve.deploying():
        serve.create_backend("count", count, config={"graceful_shutdown_timeout_s": 0.2})
        serve.create_endpoint("count", backend="count")
    stream, closed = serve.get_handle("count").stream(), serve.get_handle("count").stream()
    assert next(stream) == next(closed) == 1
try:
    list(stream)
except (serve.InstanceError, serve.BackendGone) as error:
    print(error)
closed.close()
try:
    next(closed)
except serve.Cancelled as error:
    print(error)
"""


def endless_and_plain(tally: Tally) -> Handler:
    def count(request: Any) -> Iterator[int]:
        try:
            number = 0
            while True:
                yield number
                number += 1
        finally:
            tally.note("ended")

    return count


def gated(gate: Gate, numbers: int = 3) -> Handler:
    """Yields a number, and waits at the gate before the others."""

    async def count(request: Any) -> AsyncIterator[int]:
        yield 0
        await gate.pass_through_async()
        for number in range(1, numbers):
            yield number

    return count


async def all_of(stream: serve.Stream) -> list[Any]:
    return [value async for value in stream]


# Values.


@pytest.mark.parametrize("method", ["__call__", "slowly"])
def test_a_plain_handle_reads_the_values_in_order(counter: str, method: str) -> None:
    handle = serve.get_handle(counter).options(method_name=method)
    assert list(handle.stream(1000)) == list(range(1000))


@pytest.mark.parametrize("method", ["__call__", "slowly"])
def test_an_async_handle_reads_the_values_in_order(counter: str, method: str) -> None:
    handle = serve.get_handle(counter, sync=False).options(method_name=method)
    assert asyncio.run(all_of(handle.stream(1000))) == list(range(1000))


def test_a_generator_that_a_handler_returns_flows_too(counter: str) -> None:
    assert list(serve.get_handle(counter).options(method_name="returned").stream(3)) == [0, 2, 4]


def test_a_value_may_be_larger_than_all_that_is_made_ahead_of_its_reader(counter: str) -> None:
    began = time.monotonic()
    values = list(serve.get_handle(counter).options(method_name="large").stream(20_000_000))
    assert [len(value) for value in values] == [20_000_000, 3]
    assert time.monotonic() - began < IDLE_TIMEOUT_S / 2, "it did not stand still until somebody looked"


def test_any_object_travels_as_a_value(counter: str) -> None:
    values = list(serve.get_handle(counter).options(method_name="objects").stream())
    once = serve.get_handle(counter).options(method_name="objects").remote().result(timeout=30)
    assert values == once == [None, "", b"", "text", b"bytes", {1, 2}, [1, 2.5], Picture(b"\x00" * 200_000)]


def test_plain_results_hold_for_each_value(counter: str) -> None:
    stream = serve.get_handle(counter).options(method_name="objects", results="plain").stream()
    assert [next(stream) for _ in range(5)] == [None, "", b"", "text", b"bytes"]
    with pytest.raises(serve.NotEncodable, match="opens none"):
        next(stream)
    assert list(stream) == [], "an error is the end"


def test_a_handler_that_yields_nothing_makes_an_empty_stream(counter: str) -> None:
    assert list(serve.get_handle(counter).options(method_name="nothing").stream()) == []


def test_the_first_value_is_there_before_the_second_is_made(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    stream = serve.get_handle(deploy(gated(gate))).stream()
    assert next(stream) == 0
    gate.open()
    assert list(stream) == [1, 2]


def test_remote_gets_the_values_as_a_list(counter: str) -> None:
    handle = serve.get_handle(counter)
    assert handle.remote(3).result(timeout=30) == [0, 1, 2]
    assert handle.options(method_name="slowly").remote(3).result(timeout=30) == [0, 1, 2]
    assert handle.options(method_name="nothing").remote().result(timeout=30) == []
    with pytest.raises(TooMany):
        handle.options(method_name="fail").remote(3).result(timeout=30)


def test_many_streams_flow_at_once(counter: str) -> None:
    async def main() -> list[list[int]]:
        handle = serve.get_handle(counter, sync=False).options(method_name="slowly")
        return list(await asyncio.gather(*[all_of(handle.stream(number)) for number in range(50)]))

    assert asyncio.run(main()) == [list(range(number)) for number in range(50)]


def test_threads_read_streams_of_their_own(counter: str) -> None:
    handle = serve.get_handle(counter)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: len(list(handle.stream(number))), range(0, 400, 10))) == list(range(0, 400, 10))


def test_a_handler_waits_for_a_reader_that_does_not_read(deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)

    def count(request: Any) -> Iterator[bytes]:
        for number in range(500):
            tally.note(number)
            yield bytes(10_000)

    stream = serve.get_handle(deploy(count)).stream()
    next(stream)
    wait_until(lambda: len(tally) > 50)
    time.sleep(0.5)  # a handler that does not wait has made all by now
    assert len(tally) < 200
    assert len(list(stream)) == 499 and len(tally) == 500


@embedded_only
def test_a_reader_that_takes_its_time_with_each_value_is_not_gone(counter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "IDLE_TIMEOUT_S", 7.0)  # less than it takes for what comes at once
    values = []
    for value in serve.get_handle(counter).stream(200):
        values.append(value)
        time.sleep(0.15 if value < 70 else 0)
    assert values == list(range(200))


# Ray Serve 2.


def test_remote_of_a_handle_with_the_option_stream_is_a_stream(counter: str) -> None:
    streaming = serve.get_handle(counter).options(stream=True)
    assert list(streaming.remote(3)) == [0, 1, 2]
    assert asyncio.run(all_of(serve.get_handle(counter, sync=False).options(stream=True, method_name="slowly").remote(3))) == [0, 1, 2]
    assert list(streaming.options(method_name="returned").remote(2)) == [0, 2], "it stays one"
    assert list(pickle.loads(pickle.dumps(streaming)).remote(3)) == [0, 1, 2]


# Errors.


def test_an_answer_in_one_piece_is_no_stream(counter: str) -> None:
    stream = serve.get_handle(counter).options(method_name="in_one_piece").stream()
    with pytest.raises(TypeError, match=r"in one piece: call it with remote\(\), or let it yield"):
        next(stream)
    assert list(stream) == []


def test_an_exception_comes_after_the_values_before_it(counter: str) -> None:
    values = []
    with pytest.raises(TooMany, match="no more than 3") as raised:
        for value in serve.get_handle(counter).options(method_name="fail").stream(3):
            values.append(value)
    assert values == [0, 1, 2]
    assert "Remote traceback" in raised.value.__notes__[0]


def test_an_exception_before_the_first_value_is_raised_as_remote_raises_it(counter: str) -> None:
    with pytest.raises(TooMany, match="none at all"):
        next(serve.get_handle(counter).options(method_name="fail_at_once").stream())


def test_a_stream_that_begins_too_late_raises_a_timeout(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def wait(request: Any) -> AsyncIterator[int]:
        await gate.pass_through_async()
        yield 1

    stream = serve.get_handle(deploy(wait)).options(request_timeout_s=0.3).stream()
    with pytest.raises(serve.RequestTimeout):
        next(stream)


def test_the_requests_time_ends_with_the_first_value(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    stream = serve.get_handle(deploy(gated(gate))).options(request_timeout_s=1).stream()
    assert next(stream) == 0
    time.sleep(1.5)
    gate.open()
    assert list(stream) == [1, 2]


def test_a_handler_that_is_silent_for_too_long_is_late(deploy: Deploy, tmp_path: Path) -> None:
    stream = serve.get_handle(deploy(gated(Gate(tmp_path)), stream_idle_timeout_s=0.3)).stream()
    assert next(stream) == 0
    with pytest.raises(serve.RequestTimeout, match="stream_idle_timeout_s"):
        next(stream)


def test_a_stream_that_somebody_else_cancels_raises_cancelled(deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    stream = serve.get_handle(deploy(endless(tally))).stream()
    assert next(stream) == 0
    assert serve.future(stream.id).cancel()
    with pytest.raises(serve.Cancelled):
        for _ in stream:
            pass
    wait_until(lambda: tally.lines == ["ended"], WITHIN_S)


@pytest.mark.parametrize("leave", [serve.Stream.close, serve.Stream.cancel])
def test_a_stream_that_is_left_while_it_is_read_raises_cancelled(
    deploy: Deploy, tmp_path: Path, leave: Callable[[serve.Stream], None]
) -> None:
    gate = Gate(tmp_path)
    stream = serve.get_handle(deploy(gated(gate))).stream()
    assert next(stream) == 0
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, stream)
        wait_until(stream._step.locked, WITHIN_S)
        leave(stream)
        with pytest.raises(serve.Cancelled, match="not all of it"):
            rest.result(WITHIN_S)
    gate.open()
    with pytest.raises(serve.Cancelled):
        next(stream)


def test_a_stream_that_was_read_to_its_end_is_whole_after_its_end_too(counter: str) -> None:
    stream = serve.get_handle(counter).stream(2)
    assert list(stream) == [0, 1]
    stream.close()
    stream.cancel()
    assert list(stream) == []


def test_get_and_wait_say_that_a_stream_is_looped_over(counter: str) -> None:
    with serve.get_handle(counter).stream(2) as stream:
        calls: list[Callable[[Any], Any]] = [serve.get, serve.wait, lambda stream: serve.wait([stream])]
        for call in calls:
            with pytest.raises(serve.BadType, match="loop over a stream"):
                call(stream)


def test_what_no_handle_takes_is_said_in_one_sentence(counter: str) -> None:
    handle = serve.get_handle(counter)
    with pytest.raises(ValueError, match="resumable must be True or False, not 1"):
        handle.options(resumable=1)
    with pytest.raises(TypeError, match="no option chunks: there are stream, method_name"):
        handle.options(chunks=True)
    with pytest.raises(serve.BadValue, match="take the one that it was made of"):
        handle.options(stream=True).options(stream=False)
    with pytest.raises(serve.NotEncodable, match="read in the process that began it"):
        handle.remote(handle.stream(1))
    with pytest.raises(serve.BadType, match="was streamed"):
        stream = handle.stream(1)
        list(stream)
        serve.future(stream.id).result(timeout=30)


# Leaving.


def close(stream: serve.Stream) -> None:
    stream.close()


def leave_the_block(stream: serve.Stream) -> None:
    with stream:
        next(stream)


def leave_the_async_block(stream: serve.Stream) -> None:
    async def main() -> None:
        async with stream:
            await anext(stream)

    asyncio.run(main())


def close_in_a_coroutine(stream: serve.Stream) -> None:
    async def main() -> None:
        async with contextlib.aclosing(stream):
            await anext(stream)

    asyncio.run(main())


def cancel_the_task(stream: serve.Stream) -> None:
    async def read() -> None:
        async for _ in stream:
            pass

    async def main() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(read(), 0.1)

    asyncio.run(main())


@pytest.mark.parametrize("handler", [endless, endless_and_plain])
@pytest.mark.parametrize("leave", [close, leave_the_block, leave_the_async_block, close_in_a_coroutine, cancel_the_task])
def test_who_leaves_a_stream_cancels_its_request(
    deploy: Deploy, tmp_path: Path, handler: Callable[[Tally], Handler], leave: Callable[[serve.Stream], None]
) -> None:
    tally = Tally(tmp_path)
    stream = serve.get_handle(deploy(handler(tally))).stream()
    assert next(stream) == 0
    leave(stream)
    wait_until(lambda: tally.lines == ["ended"], WITHIN_S)
    with pytest.raises(serve.Cancelled):
        next(stream)


@embedded_only
def test_a_stream_that_its_reader_gives_up_cancels_its_request(deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally(tmp_path)

    async def stuck(request: Any) -> AsyncIterator[int]:
        try:
            yield 0
            await asyncio.sleep(1000)
        finally:
            tally.note("ended")

    monkeypatch.setattr(incoming_streams, "LONGER_S", -60.0)
    monkeypatch.setattr(incoming_streams, "CREDIT_EVERY_S", 0.5)
    stream = serve.get_handle(deploy(stuck, stream_idle_timeout_s=61.0)).stream()
    assert next(stream) == 0
    with pytest.raises(serve.RequestTimeout):
        next(stream)
    wait_until(lambda: tally.lines == ["ended"], WITHIN_S)


def test_a_loop_that_is_left_cancels_the_request(deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    handle = serve.get_handle(deploy(endless(tally)))
    for value in handle.stream():
        if value == 5:
            break
    wait_until(lambda: tally.lines == ["ended"], WITHIN_S)


def test_a_stream_that_is_let_go_cancels_its_request(deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    handle = serve.get_handle(deploy(endless(tally)))
    stream = handle.stream()
    next(stream)
    circle = [stream]
    circle.append(circle)  # type: ignore[arg-type]
    del stream, circle
    gc.collect()
    wait_until(lambda: tally.lines == ["ended"], WITHIN_S)


def test_a_stream_that_is_closed_before_its_first_value_cancels_its_request(deploy: Deploy, tmp_path: Path) -> None:
    tally, gate = Tally(tmp_path), Gate(tmp_path)

    async def wait(request: Any) -> AsyncIterator[int]:
        try:
            await gate.pass_through_async()
            yield 1
        finally:
            tally.note("ended")

    stream = serve.get_handle(deploy(wait)).stream()
    wait_until(lambda: gate.came)
    stream.close()
    wait_until(lambda: tally.lines == ["ended"], WITHIN_S)
    with pytest.raises(serve.Cancelled):
        next(stream)


def test_two_threads_do_not_wait_for_one_value(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    stream = serve.get_handle(deploy(gated(gate))).stream()
    assert next(stream) == 0
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, stream)
        wait_until(stream._step.locked)
        with pytest.raises(serve.BadValue, match="another thread or task waits"):
            next(stream)
        gate.open()
        assert rest.result(30) == [1, 2]


def test_a_hundred_streams_that_are_left_leave_no_thread_and_no_wait_behind(counter: str, client: serve.Client) -> None:
    handle = serve.get_handle(counter)
    threads = threading.active_count()
    for number in range(100):
        with handle.stream(1000) as stream:
            for value in stream:
                if value == number:
                    break
    pending = client.sender._requests.pending
    wait_until(lambda: len(pending) == 0)
    assert threading.active_count() <= threads + 8


# Passing on.


async def pass_on_returned(request: Any) -> Any:
    return serve.get_handle(request.data, sync=False).stream(300)


def pass_on_from_plain_code(request: Any) -> Any:
    return serve.get_handle(request.data).stream(300)


async def pass_on_in_a_loop(request: Any) -> AsyncIterator[Any]:
    async for value in serve.get_handle(request.data, sync=False).stream(300):
        yield value


def pass_on_yielded(request: Any) -> Iterator[Any]:
    yield from serve.get_handle(request.data).stream(300)


@pytest.mark.parametrize("pass_on", [pass_on_returned, pass_on_from_plain_code, pass_on_in_a_loop, pass_on_yielded])
def test_a_handler_passes_a_stream_on(counter: str, deploy: Deploy, pass_on: Handler) -> None:
    handle = serve.get_handle(deploy(pass_on))
    assert list(handle.stream(counter)) == list(range(300))
    assert handle.remote(counter).result(timeout=30) == list(range(300))


@pytest.mark.parametrize("pass_on", [pass_on_returned, pass_on_from_plain_code, pass_on_in_a_loop, pass_on_yielded])
def test_who_leaves_a_stream_that_was_passed_on_cancels_both_requests(deploy: Deploy, tmp_path: Path, pass_on: Handler) -> None:
    tally = Tally(tmp_path)
    inner, outer = deploy(endless(tally)), deploy(pass_on)
    for value in serve.get_handle(outer).stream(inner):
        if value == 5:
            break
    wait_until(lambda: tally.lines == ["ended"], WITHIN_S)


@pytest.mark.parametrize("pass_on", [pass_on_returned, pass_on_from_plain_code, pass_on_in_a_loop, pass_on_yielded])
def test_a_web_client_gets_the_stream_that_a_handler_passes_on(deploy: Deploy, tmp_path: Path, pass_on: Handler) -> None:
    tally = Tally(tmp_path)
    inner, url = deploy(endless(tally)), deploy.at(pass_on)
    with httpx.stream("POST", url, json=inner) as answer:
        lines = answer.iter_lines()
        assert [next(lines) for _ in range(3)] == ["0", "1", "2"]
        assert answer.headers["content-type"] == "application/x-ndjson"
    wait_until(lambda: tally.lines == ["ended"], WITHIN_S)


def test_an_exception_is_passed_on_with_the_stream(counter: str, deploy: Deploy) -> None:
    async def pass_on(request: Any) -> Any:
        return serve.get_handle(request.data, sync=False).options(method_name="fail").stream(3)

    values = []
    with pytest.raises(TooMany):
        for value in serve.get_handle(deploy(pass_on)).stream(counter):
            values.append(value)
    assert values == [0, 1, 2]


# By id.


def test_a_resumable_stream_is_read_on_behind_a_number(counter: str) -> None:
    stream = serve.get_handle(counter).options(resumable=True).stream(500)
    values = [next(stream) for _ in range(100)]
    seq = stream.seq
    stream.close()
    rest = serve.stream(stream.id, after=seq)
    assert [*values, *rest] == list(range(500))
    assert list(serve.stream(stream.id)) == list(range(500)), "from the beginning, though it has ended"
    assert list(serve.stream(stream.id, after=rest.seq)) == []


def test_a_resumable_stream_is_cut_ten_times_and_runs_once(deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)

    async def count(request: Any) -> AsyncIterator[int]:
        tally.note("runs")
        for number in range(1000):
            yield number

    async def main() -> list[int]:
        stream = serve.get_handle(deploy(count), sync=False).options(resumable=True).stream()
        values: list[int] = []
        for cut in range(10):
            async for value in stream:
                values.append(value)
                if len(values) == 90 * (cut + 1):
                    break
            await stream.aclose()
            stream = serve.stream(stream.id, after=stream.seq)
        return [*values, *await all_of(stream)]

    assert asyncio.run(main()) == list(range(1000))
    assert tally.lines == ["runs"]


def test_a_resumable_stream_that_nobody_reads_on_is_cancelled(deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    stream = serve.get_handle(deploy(endless(tally), resume_grace_s=0.3)).options(resumable=True).stream()
    assert next(stream) == 0
    stream.close()
    wait_until(lambda: tally.lines == ["ended"], WITHIN_S)
    with pytest.raises(serve.Cancelled):
        list(serve.stream(stream.id, after=stream.seq))


def test_a_place_that_is_not_kept_any_more_is_refused_with_the_first_that_is(deploy: Deploy) -> None:
    def count(request: Any) -> Iterator[int]:
        yield from range(500)

    stream = serve.get_handle(deploy(count, stream_kept_frames=100)).options(resumable=True).stream()
    assert list(stream) == list(range(500))
    with pytest.raises(serve.BadValue, match=r"after chunk 1 of .* is not kept any more: .* comes after chunk \d+") as refusal:
        next(serve.stream(stream.id, after=1))
    first = int(str(refusal.value).rpartition(" ")[2])
    assert first >= 300 and list(serve.stream(stream.id, after=first)) == list(range(first, 500))


def test_a_resumable_stream_is_cancelled_by_its_reader(deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    stream = serve.get_handle(deploy(endless(tally))).options(resumable=True).stream()
    assert next(stream) == 0
    stream.cancel()
    wait_until(lambda: tally.lines == ["ended"], WITHIN_S)
    with pytest.raises(serve.Cancelled):
        list(serve.stream(stream.id))


def test_an_exception_is_read_by_id_too(counter: str) -> None:
    stream = serve.get_handle(counter).options(resumable=True, method_name="fail").stream(3)
    assert next(stream) == 0
    again, values = serve.stream(stream.id), []
    with pytest.raises(TooMany):
        for value in again:
            values.append(value)
    assert values == [0, 1, 2]


def test_a_stream_that_has_shown_nothing_yet_is_awaited_by_its_id(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def late(request: Any) -> Iterator[int]:
        gate.pass_through()
        yield from range(5)

    stream = serve.get_handle(deploy(late)).options(resumable=True).stream()
    with ThreadPoolExecutor() as others:
        reading = others.submit(lambda: list(serve.stream(stream.id)))
        wait_until(lambda: gate.came, WITHIN_S)
        assert not reading.done()
        gate.open()
        assert reading.result(30) == [0, 1, 2, 3, 4]
    assert list(serve.stream(stream.id)) == [0, 1, 2, 3, 4]


def test_a_request_that_fails_before_its_first_value_says_so_to_who_awaits_its_stream_by_id(deploy: Deploy) -> None:
    def slow(request: Any) -> Iterator[float]:
        time.sleep(1)
        yield 1 / request.data

    stream = serve.get_handle(deploy(slow)).options(resumable=True).stream(0)
    with pytest.raises(ZeroDivisionError):
        next(serve.stream(stream.id))


def test_the_wait_for_a_stream_that_nobody_begins_ends_when_its_reader_closes_it(counter: str) -> None:
    stream = serve.stream("0" * 32)
    threading.Timer(0.3, stream.close).start()
    with pytest.raises(serve.Cancelled):
        next(stream)


def test_a_stream_that_cannot_be_read_by_id_is_refused_with_a_sentence(counter: str, deploy: Deploy) -> None:
    url = deploy.at(Counter)
    stream = serve.get_handle(counter).stream(3)
    assert list(stream) == [0, 1, 2]
    for unknown, after in ((stream.id, 0), ("0" * 32, 1)):
        with pytest.raises(serve.BadValue, match="has no stream to go on with"):
            next(serve.stream(unknown, after=after))
    with httpx.stream("POST", url, json=3, headers={"Accept": "text/event-stream"}) as events:
        events.read()
    with pytest.raises(serve.BadValue, match="has no stream to go on with"):
        next(serve.stream(events.headers["x-request-id"]))
    for no_number in (-1, 10**30):
        with pytest.raises(serve.BadValue, match=f"from 0 on, not {no_number}"):
            serve.stream(stream.id, after=no_number)
    with pytest.raises(serve.BadType, match="not 7"):
        serve.stream(7)  # type: ignore[arg-type]


ELSEWHERE = """
import sys
import mqserve as serve

stream_id, seq = sys.argv[1], int(sys.argv[2])
with serve.connect():
    print(*serve.stream(stream_id, after=seq))
"""


CLOSES = """
import sys
import mqserve as serve

with serve.connect():
    stream = serve.get_handle(sys.argv[1]).stream()
    next(stream)
try:
    list(stream)
except serve.InstanceError as error:
    print(error)
"""


@distributed_only
def test_another_process_reads_on(
    client: serve.Client, counter: str, broker_url: str, store_url: str, shared_namespace: str, tmp_path: Path
) -> None:
    stream = serve.get_handle(counter).options(resumable=True).stream(500)
    values = [next(stream) for _ in range(300)]
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    env = os.environ | {
        "MQSERVE_BROKER_URL": broker_url,
        "MQSERVE_STORE_URL": store_url,
        "MQSERVE_NAMESPACE": shared_namespace,
    }
    command = [sys.executable, "elsewhere.py", stream.id, str(stream.seq)]
    told = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert [*values, *map(int, told.stdout.split())] == list(range(500)), told.stderr


# Processes.


@distributed_only
def test_a_replica_that_dies_in_between_is_told_of(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def count(request: Any) -> AsyncIterator[int]:
        yield os.getpid()
        await gate.pass_through_async()

    stream = serve.get_handle(deploy(count)).stream()
    os.kill(next(stream), signal.SIGKILL)
    with pytest.raises(serve.ReplicaLost):
        next(stream)


@distributed_only
def test_a_stream_that_is_replayed_goes_on_where_its_replica_died(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally, gate = Tally(tmp_path), Gate(tmp_path)

    def count(request: Any) -> Iterator[int]:
        tally.note(os.getpid())
        for number in range(100):
            if number == 50:
                gate.pass_through()
            yield number

    stream = serve.get_handle(deploy(count, on_death="replay")).stream()
    values = [next(stream) for _ in range(50)]
    os.kill(int(tally.lines[0]), signal.SIGKILL)
    gate.open()
    assert [*values, *stream] == list(range(100))
    assert len(tally) == 2


@MANY_THREADS
def test_a_forked_child_cannot_read_its_parents_stream(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    stream = serve.get_handle(deploy(gated(gate))).stream()
    assert next(stream) == 0

    def read() -> list[int]:
        try:
            return list(stream)
        finally:
            stream.close()

    with pytest.raises(serve.InstanceError, match="begin it in the child"):
        in_a_child(read)
    with pytest.raises(serve.InstanceError, match="begin it in the child"):
        in_a_child(stream.cancel)
    gate.open()
    assert list(stream) == [1, 2], "the child has not closed it"


def test_the_end_of_an_instance_ends_its_streams(tmp_path: Path) -> None:
    told = subprocess.run([sys.executable, "-c", ENDED], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0 and "shut down" in told.stdout, told.stderr


@distributed_only
def test_a_client_that_is_closed_leaves_its_streams(
    deploy: Deploy, shared_namespace: str, broker_url: str, store_url: str, tmp_path: Path
) -> None:
    tally = Tally(tmp_path)
    name = deploy(endless(tally))
    (tmp_path / "closes.py").write_text(CLOSES)
    env = os.environ | {
        "MQSERVE_BROKER_URL": broker_url,
        "MQSERVE_STORE_URL": store_url,
        "MQSERVE_NAMESPACE": shared_namespace,
    }
    command = [sys.executable, "closes.py", name]
    told = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert "was closed meanwhile" in told.stdout, told.stderr
    wait_until(lambda: tally.lines == ["ended"], WITHIN_S)


def test_a_backend_that_is_deleted_ends_its_streams(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    name = deploy(endless(tally), graceful_shutdown_timeout_s=0.3)
    stream = serve.get_handle(name).stream()
    assert next(stream) == 0
    client.delete_endpoint(name)
    client.delete_backend(name)
    deploy.forget(name)
    with pytest.raises(serve.BackendGone):
        for _ in stream:
            pass
    wait_until(lambda: tally.lines == ["ended"], WITHIN_S)
