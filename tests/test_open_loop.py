"""The load generator of the overload scenario: neither a server nor a generator that falls behind can hide it."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.instances import ROOT

PROGRAM = ROOT / "benchmarks" / "programs" / "open_loop.py"
RATE = 100  # requests a second, for one second
WORK_S = 0.02
FROZEN_S = 0.5


@asynccontextmanager
async def generating(before_answer: Callable[[int], Awaitable[None]]) -> AsyncIterator[asyncio.subprocess.Process]:
    """A generator and its server, which awaits `before_answer` with the number of each request, and refuses every tenth at once."""
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while await reader.readline():
            await reader.readuntil(b"\r\n\r\n")
            asked += 1
            if asked % 10 == 0:
                writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n")
            else:
                await before_answer(asked)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        yield await asyncio.create_subprocess_exec(sys.executable, str(PROGRAM), url, str(RATE), "1", stdout=asyncio.subprocess.PIPE)


async def read(program: asyncio.subprocess.Process) -> dict[str, Any]:
    told, _ = await program.communicate()
    assert program.returncode == 0
    answers: dict[str, Any] = json.loads(told)
    return answers


@pytest.mark.anyio
async def test_requests_are_sent_when_they_are_due_however_slow_the_server_is_and_refusals_count_apart() -> None:
    """The server can answer 50 requests a second: the last one of those that are due in one second waits for another second."""
    turn = asyncio.Lock()

    async def work(number: int) -> None:
        async with turn:
            await asyncio.sleep(WORK_S)

    async with generating(work) as program:
        found = await read(program)
    assert {status: len(times) for status, times in found["latencies_s"].items()} == {"200": 90, "429": 10}
    waited_s = 90 * WORK_S - 1
    assert max(found["latencies_s"]["200"]) > waited_s
    assert max(found["sent_late_s"]) < waited_s / 2, "it waited for answers"


@pytest.mark.anyio
async def test_a_latency_counts_from_the_time_at_which_the_request_was_due() -> None:
    """The server answers at once, and the generator is frozen: what was due meanwhile is sent late."""
    has_begun = asyncio.Event()

    async def note(number: int) -> None:
        if number > RATE * 0.2:
            has_begun.set()

    async with generating(note) as program:
        await has_begun.wait()
        program.send_signal(signal.SIGSTOP)
        await asyncio.sleep(FROZEN_S)
        program.send_signal(signal.SIGCONT)
        found = await read(program)
    late = [latency_s for times in found["latencies_s"].values() for latency_s in times if latency_s > FROZEN_S / 5]
    assert len(late) > RATE * FROZEN_S / 2, late
