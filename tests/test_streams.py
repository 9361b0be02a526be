"""Handlers that yield stream their answers over HTTP, to real clients."""

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
import redis

from tests.gates import Gate
from tests.instances import Deploy, distributed_only, wait_until
from tests.tallies import Tally

MIB = 1024 * 1024


def plain(gate: Gate) -> Callable[[Any], Iterator[str]]:
    def handler(request: Any) -> Iterator[str]:
        yield "first"
        gate.pass_through()
        yield "second"

    return handler


def asynchronous(gate: Gate) -> Callable[[Any], AsyncIterator[str]]:
    async def handler(request: Any) -> AsyncIterator[str]:
        yield "first"
        await gate.pass_through_async()
        yield "second"

    return handler


KINDS = pytest.mark.parametrize("kind", [plain, asynchronous])


@KINDS
def test_the_first_chunk_is_there_before_the_second_is_made(kind: Any, deploy: Deploy, gate: Gate) -> None:
    with httpx.stream("GET", deploy.at(kind(gate))) as response:
        chunks = response.iter_raw()
        assert next(chunks) == b"first"
        assert response.headers["content-type"] == "text/plain; charset=utf-8" and "content-length" not in response.headers
        gate.open()
        assert b"".join(chunks) == b"second"


def test_curl_shows_each_chunk_as_it_is_made(deploy: Deploy, gate: Gate) -> None:
    with subprocess.Popen(["curl", "-sN", deploy.at(plain(gate))], stdout=subprocess.PIPE) as curl:
        assert curl.stdout is not None
        assert curl.stdout.read(5) == b"first"
        gate.open()
        assert curl.stdout.read() == b"second"
    assert curl.returncode == 0


class Model:
    """Counts up to a limit, by a plain method and by an async one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, request: Any) -> Iterator[dict[str, int]]:
        for number in range(self.limit):
            yield {"number": number}

    async def texts(self, request: Any) -> AsyncIterator[bytes]:
        for number in range(self.limit):
            yield b"%d," % number
            await asyncio.sleep(0)


def test_methods_stream_too_and_values_are_one_json_a_line(deploy: Deploy) -> None:
    url = deploy.at(Model, 3)
    lines = httpx.get(url)
    assert lines.text == '{"number":0}\n{"number":1}\n{"number":2}\n' and lines.headers["content-type"] == "application/x-ndjson"
    texts = httpx.get(url, headers={"X-SERVE-CALL-METHOD": "texts"})
    assert texts.content == b"0,1,2," and texts.headers["content-type"] == "application/octet-stream"


def failing(request: Any) -> Iterator[str]:
    yield "first"
    raise ValueError("on purpose")


def test_a_client_sees_that_an_answer_is_not_complete(deploy: Deploy) -> None:
    url = deploy.at(failing)
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(url)
    assert subprocess.run(["curl", "-sN", url], capture_output=True, timeout=30).returncode == 18  # a partial file
    assert subprocess.run(["curl", "-sN", "--http1.0", url], capture_output=True, timeout=30).returncode == 56  # a reset


def failing_at_once(request: Any) -> Iterator[str]:
    if request.method == "GET":
        raise ValueError("not that")
    yield ""


def test_a_failure_before_the_first_chunk_is_an_answer_of_its_own(deploy: Deploy) -> None:
    answer = httpx.get(deploy.at(failing_at_once))
    assert answer.status_code == 500 and answer.headers["content-type"] == "application/problem+json"


def test_http_1_0_gets_the_whole_answer(deploy: Deploy) -> None:
    said = subprocess.run(["curl", "-siN", "--http1.0", deploy.at(Model, 3)], capture_output=True, timeout=30).stdout
    head, _, body = said.partition(b"\r\n\r\n")
    assert b"connection: close" in head and body == b'{"number":0}\n{"number":1}\n{"number":2}\n'


def test_head_makes_no_stream(deploy: Deploy) -> None:
    answer = httpx.head(deploy.at(Model, 3))
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/x-ndjson" and answer.content == b""


def endless(tally: Tally, *, asynchronously: bool) -> Callable[[Any], Any]:
    async def by_await(request: Any) -> AsyncIterator[str]:
        try:
            while True:
                yield "on and on"
                await asyncio.sleep(0.01)
        finally:
            tally.note("over")

    def by_step(request: Any) -> Iterator[str]:
        try:
            while True:
                yield "on and on"
                time.sleep(0.01)
        finally:
            tally.note("over")

    return by_await if asynchronously else by_step


@pytest.mark.parametrize("asynchronously", [True, False])
def test_a_generator_ends_soon_after_its_client_has_left(deploy: Deploy, tally: Tally, *, asynchronously: bool) -> None:
    with httpx.stream("GET", deploy.at(endless(tally, asynchronously=asynchronously))) as response:
        next(response.iter_raw())
        assert not len(tally)
    wait_until(lambda: tally.lines == ["over"], 10)


def test_a_generator_ends_whose_client_leaves_while_nothing_comes(deploy: Deploy, gate: Gate, tally: Tally) -> None:
    async def handler(request: Any) -> AsyncIterator[str]:
        try:
            yield "first"
            await gate.pass_through_async()
        finally:
            tally.note("over")

    with httpx.stream("GET", deploy.at(handler)) as response:
        next(response.iter_raw())
    wait_until(lambda: tally.lines == ["over"], 10)


def test_a_generator_ends_whose_client_leaves_while_it_is_waited_for(deploy: Deploy, tally: Tally) -> None:
    def handler(request: Any) -> Iterator[bytes]:
        try:
            while True:
                yield b"x" * MIB
        finally:
            tally.note("over")

    with httpx.stream("GET", deploy.at(handler)) as response:
        next(response.iter_raw())
        time.sleep(0.5)
    wait_until(lambda: tally.lines == ["over"], 10)


def megabytes(request: Any) -> Iterator[bytes]:
    for _ in range(32):
        yield b"x" * MIB


def test_a_slow_reader_is_waited_for(deploy: Deploy) -> None:
    """32 MiB, of which the window and the buffers of sockets hold a few: the generator stops until more is read."""
    received = 0
    with httpx.stream("GET", deploy.at(megabytes)) as response:
        for number, part in enumerate(response.iter_raw(MIB)):
            received += len(part)
            if number < 3:
                time.sleep(0.3)
    assert received == 32 * MIB


def test_a_generator_makes_little_that_nobody_reads(deploy: Deploy, tally: Tally) -> None:
    def handler(request: Any) -> Iterator[bytes]:
        for number in range(64):
            tally.note(str(number))
            yield b"x" * MIB

    with httpx.stream("GET", deploy.at(handler)) as response:
        parts = response.iter_raw()
        next(parts)
        wait_until(lambda: len(tally) >= 2)
        before = -1
        while before != len(tally):  # until it has stopped
            before = len(tally)
            time.sleep(1)
        assert len(tally) < 16  # sockets of the loopback hold some, too
        rest = sum(len(part) for part in parts)
    assert rest > 60 * MIB and len(tally) == 64


def grown(processes: list[psutil.Process], before: dict[int, int]) -> dict[int, int]:
    return {process.pid: (process.memory_info().rss - before[process.pid]) // MIB for process in processes}


def is_ours(process: psutil.Process) -> bool:
    try:
        return "mqserve" in " ".join(process.cmdline())
    except psutil.Error:  # it ends, as those of an earlier test do
        return False


@distributed_only
def test_neither_a_process_nor_redis_holds_what_a_slow_client_has_not_read(deploy: Deploy, environment: dict[str, str]) -> None:
    url = deploy.at(megabytes)
    store = redis.Redis.from_url(environment["MQSERVE_STORE_URL"])
    for _ in range(2):
        assert len(httpx.get(url).content) == 32 * MIB  # what a process keeps of its first large answer it keeps once
    children = [process for process in psutil.Process().children(recursive=True) if is_ours(process)]
    assert children
    before = {process.pid: process.memory_info().rss for process in children}
    highest: dict[int, int] = dict.fromkeys(before, 0)
    used_before, most_used = used_memory(store), 0
    with httpx.stream("GET", url) as response:
        for number, _ in enumerate(response.iter_raw(MIB)):
            if number < 12:
                time.sleep(0.2)
            for pid, size in grown(children, before).items():
                highest[pid] = max(highest[pid], size)
            most_used = max(most_used, used_memory(store) - used_before)
    assert max(highest.values()) < 8, highest
    assert most_used < 8 * MIB


def used_memory(store: Any) -> int:
    return int(store.info("memory")["used_memory"])


@distributed_only
def test_answers_that_have_ended_leave_no_stream_behind(deploy: Deploy, environment: dict[str, str]) -> None:
    url = deploy.at(Model, 5)
    store = redis.Redis.from_url(environment["MQSERVE_STORE_URL"])
    pattern = f"mqserve:{environment['MQSERVE_NAMESPACE']}:"
    with httpx.Client() as http:
        for _ in range(50):
            assert http.get(url).text.count("\n") == 5

    def left() -> list[Any]:
        return [*store.scan_iter(f"{pattern}stream:*"), *store.scan_iter(f"{pattern}owner:*")]

    def told() -> str:
        futures = {key: f"{pattern}future:{key.decode().rpartition(':')[2]}" for key in left()}
        return str([(key, store.pttl(key), store.get(future)) for key, future in futures.items()])

    wait_until(lambda: not left(), told=told)


@distributed_only
def test_two_hundred_downloads_that_are_left_in_the_middle_leave_no_key_behind(deploy: Deploy, environment: dict[str, str]) -> None:
    url = deploy.at(megabytes)
    store = redis.Redis.from_url(environment["MQSERVE_STORE_URL"])
    of_requests = f"mqserve:{environment['MQSERVE_NAMESPACE']}:*{{*}}"

    def leave_after(parts: int) -> None:
        with http.stream("GET", url) as response:
            for _, _ in zip(range(parts), response.iter_raw(MIB // 4), strict=False):
                pass

    def left() -> list[bytes]:
        """All but what stays of any request until it expires: its result, and the mark that it was started."""
        return [key for key in store.scan_iter(of_requests) if b":future:" not in key and b":start:" not in key]

    with httpx.Client(timeout=60) as http, ThreadPoolExecutor(16) as clients:
        list(clients.map(leave_after, [1, 2, 5, 9] * 50))
    wait_until(lambda: not left(), told=lambda: [(key, store.pttl(key)) for key in left()])
    assert all(store.pttl(key) != -1 for key in store.scan_iter(of_requests))


def test_a_stream_counts_as_one_answer(deploy: Deploy, url: str) -> None:
    streamed = deploy.at(Model, 3)
    httpx.get(streamed)
    route = streamed.removeprefix(url)
    assert f'mqserve_num_http_responses_total{{route="{route}",status="200"}} 1.0' in httpx.get(f"{url}/-/metrics").text


def test_a_connection_that_streamed_serves_the_next_request(deploy: Deploy) -> None:
    url = deploy.at(Model, 3)
    with httpx.Client() as http:
        assert [http.get(url).text.count("\n") for _ in range(3)] == [3, 3, 3]
