"""The load generator of the overload scenario: a server that falls behind shows in its latencies."""

import asyncio
import json
import sys

import pytest

from tests.instances import ROOT

PROGRAM = ROOT / "benchmarks" / "programs" / "open_loop.py"
WORK_S = 0.02


@pytest.mark.anyio
async def test_a_latency_counts_from_the_time_at_which_the_request_was_due_and_refusals_count_apart() -> None:
    """50 requests a second are what the server can take, and 100 are due in one second: the last accepted one waits for another second."""
    turn, asked = asyncio.Lock(), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while await reader.readline():
            await reader.readuntil(b"\r\n\r\n")
            asked += 1
            if asked % 10 == 0:
                writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n")
                continue
            async with turn:
                await asyncio.sleep(WORK_S)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        command = [sys.executable, str(PROGRAM), url, "100", "1"]
        program = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        told, _ = await program.communicate()
        assert program.returncode == 0
    latencies_s = json.loads(told)["latencies_s"]
    assert {status: len(times) for status, times in latencies_s.items()} == {"200": 90, "429": 10}
    assert max(latencies_s["200"]) > 90 * WORK_S - 1
    assert max(latencies_s["429"]) < max(latencies_s["200"]) / 2
