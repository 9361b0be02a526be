"""The metrics of several proxies on one port: each shows the sums of all, and no sum ever falls."""

import io
import os
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mqserve.broker.errors import MQServeError
from mqserve.broker.process.listener import KEY_BYTES, new_common_file
from mqserve.controller.state.documents import Backend, Desired, Endpoint
from mqserve.proxy.shared_metrics import SharedMetrics
from mqserve.proxy.streaming import FlowEnd

pytestmark = pytest.mark.anyio

ROUTES = {name: Endpoint(name, f"/{name}", ("GET",), {"b": 1.0}) for name in ("old", "new")}


def document(version: int, *endpoints: str) -> Desired:
    return Desired(version=version, backends={"b": Backend("b", "c0de", "f")}, endpoints={name: ROUTES[name] for name in endpoints})


@pytest.fixture
def file() -> Iterator[io.FileIO]:
    with new_common_file() as file:
        yield file


@pytest.fixture
async def pair(file: io.FileIO) -> AsyncIterator[tuple[SharedMetrics, SharedMetrics]]:
    """Two proxies that know the route /old."""
    one, other = (SharedMetrics(io.FileIO(os.dup(file.fileno()), "r+b")) for _ in range(2))
    for metrics in (one, other):
        metrics.keep(document(1, "old"))
    yield one, other
    for metrics in (one, other):
        await metrics.close()


@contextmanager
def another_proxy(program: str, file: io.FileIO) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs the program with the file as its first argument. It has come to the program's end, and lives."""
    command = [sys.executable, "-c", f"{program}\nprint('here', flush=True)\nsys.stdin.read()", str(file.fileno())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[file.fileno()]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        yield process
        process.kill()


async def value(metrics: SharedMetrics, name: str, **labels: str) -> float:
    """The sum of these samples on the page; -1 if there are none."""
    families = text_string_to_metric_families((await metrics.exposition()).decode())
    found = [
        sample.value for family in families for sample in family.samples if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return sum(found) if found else -1


async def test_each_proxy_shows_the_sums_of_all(pair: tuple[SharedMetrics, SharedMetrics]) -> None:
    one, other = pair
    for metrics, count in ((one, 3), (other, 4)):
        for _ in range(count):
            metrics.route("/old").answered(200, 7.0)
        metrics.route("/old").streams[FlowEnd.CANCELLED] += count
        metrics.sent["old"] += count
    await other.exposition()
    for metrics in (one, other):
        assert await value(metrics, "mqserve_num_http_requests_total", route="/old") == 7
        assert await value(metrics, "mqserve_num_http_responses_total", route="/old", status="200") == 7
        assert await value(metrics, "mqserve_num_http_streams_total", route="/old", outcome="cancelled") == 7
        assert await value(metrics, "mqserve_http_latency_ms_bucket", route="/old", le="5.0") == 0
        assert await value(metrics, "mqserve_http_latency_ms_bucket", route="/old", le="10.0") == 7
        assert await value(metrics, "mqserve_http_latency_ms_sum", route="/old") == 49
        assert await value(metrics, "mqserve_num_router_requests_total", endpoint="old") == 7


async def test_a_sum_that_was_shown_never_falls_whichever_proxy_is_asked(pair: tuple[SharedMetrics, SharedMetrics]) -> None:
    shown = 0.0
    for turn in range(50):
        counting, asked = pair[turn % 2], pair[turn // 2 % 2]
        counting.route("/old").answered(200 if turn % 3 else 503, 1.0)
        now = await value(asked, "mqserve_num_http_requests_total", route="/old")
        assert now >= shown
        shown = now
    assert await value(pair[0], "mqserve_num_http_requests_total") + len(pair[1].routes) == 50


async def test_the_counts_of_a_proxy_that_was_killed_stay_and_what_waited_there_goes(
    pair: tuple[SharedMetrics, SharedMetrics], file: io.FileIO
) -> None:
    program = (
        "import asyncio, io, sys\n"
        "from mqserve.proxy.shared_metrics import SharedMetrics\n"
        "metrics = SharedMetrics(io.FileIO(int(sys.argv[1]), 'r+b'))\n"
        "metrics.route('/old').answered(200, 1.0)\n"
        "metrics.waiting['b', 'old'] += 5\n"
        "asyncio.run(metrics.close())\n"
    )
    with another_proxy(program, file):
        pair[0].waiting["b", "old"] += 2
        assert await value(pair[0], "mqserve_backend_queued_queries") == 7
    assert await value(pair[0], "mqserve_backend_queued_queries") == 2
    assert await value(pair[0], "mqserve_num_http_requests_total") == 1


async def test_a_process_that_got_the_pid_of_a_dead_proxy_is_not_that_proxy(
    pair: tuple[SharedMetrics, SharedMetrics], file: io.FileIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    with another_proxy("import sys", file) as stranger:
        one = pair[0]
        one.waiting["b", "old"] = 5
        monkeypatch.setattr(one, "_process", (stranger.pid, 1))
        await one.exposition()
        assert await value(pair[1], "mqserve_backend_queued_queries") <= 0


async def test_a_write_that_finds_no_room_changes_nothing_and_is_said(pair: tuple[SharedMetrics, SharedMetrics], file: io.FileIO) -> None:
    pair[0].route("/old").answered(200, 1.0)
    await pair[0].exposition()
    program = (
        "import asyncio, io, os, resource, sys\n"
        "from mqserve.broker.errors import MQServeError\n"
        "from mqserve.proxy.shared_metrics import SharedMetrics\n"
        "metrics = SharedMetrics(io.FileIO(int(sys.argv[1]), 'r+b'))\n"
        "metrics.route('/old').answered(200, 1.0)\n"
        "room = os.fstat(int(sys.argv[1])).st_size + 10\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))\n"
        "try:\n"
        "    asyncio.run(metrics.exposition())\n"
        "except MQServeError as error:\n"
        "    assert 'took 10 of' in str(error), error\n"
        "else:\n"
        "    sys.exit('it was written')\n"
    )
    with another_proxy(program, file):
        assert await value(pair[0], "mqserve_num_http_requests_total") == 1


UNREADABLE = {
    "cut short": b"\x94",
    "no MessagePack": b"\xc1" * 20,
    "no text": msgspec.msgpack.encode([[0, 0], {}, {"old": 1}, {}]).replace(b"old", b"\xff" * 3),
    "other buckets": msgspec.msgpack.encode([[0, 0], {"/old": [{}, [1, 2], 0.0]}, {}, {}]),
}


@pytest.mark.parametrize("broken", UNREADABLE)
async def test_an_unreadable_file_counts_as_empty_and_is_said_once(
    pair: tuple[SharedMetrics, SharedMetrics], file: io.FileIO, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    content, content_at = UNREADABLE[broken], KEY_BYTES + 16
    os.pwrite(file.fileno(), struct.pack("<QQ", content_at, len(content)) + content, KEY_BYTES)
    for metrics in (pair[0], *pair):
        metrics.route("/old").answered(200, 1.0)
        await metrics.exposition()
    assert await value(pair[1], "mqserve_num_http_requests_total") == 3
    (said,) = caplog.messages
    assert "unreadable and begin anew" in said


async def test_the_series_of_a_deleted_route_ends(pair: tuple[SharedMetrics, SharedMetrics]) -> None:
    one, other = pair
    one.route("/old").answered(200, 1.0)
    assert await value(other, "mqserve_num_http_requests_total", route="/old") == -1, "not written yet"
    assert await value(one, "mqserve_num_http_requests_total", route="/old") == 1
    other.keep(document(2, "new"))
    for metrics in (other, one):
        assert await value(metrics, "mqserve_num_http_requests_total", route="/old") == -1


async def test_a_proxy_that_is_behind_drops_no_series_of_a_new_route(pair: tuple[SharedMetrics, SharedMetrics]) -> None:
    one, behind = pair
    one.keep(document(2, "old", "new"))
    one.route("/new").answered(200, 1.0)
    assert await value(one, "mqserve_num_http_requests_total", route="/new") == 1
    assert await value(behind, "mqserve_num_http_requests_total", route="/new") == 1


async def test_a_proxy_that_hangs_with_the_lock_does_not_hang_the_others(
    pair: tuple[SharedMetrics, SharedMetrics], file: io.FileIO
) -> None:
    pair[0].route("/old").answered(200, 1.0)
    holds_it = "import fcntl, sys; fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX)"
    with another_proxy(holds_it, file), pytest.raises(MQServeError, match="hangs while it holds their common counts"):
        await pair[0].exposition()
    assert await value(pair[0], "mqserve_num_http_requests_total") == 1


async def test_the_file_does_not_grow_with_every_write(pair: tuple[SharedMetrics, SharedMetrics], file: io.FileIO) -> None:
    sizes = set()
    for _ in range(200):
        pair[0].route("/old").answered(200, 1.0)
        await pair[0].exposition()
        sizes.add(os.fstat(file.fileno()).st_size)
    assert max(sizes) < 1000
