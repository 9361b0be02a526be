"""A publisher gone mad: tens of thousands of malformed messages, and the replica neither ends nor grows nor opens a pickle."""

import faulthandler
import time
from collections.abc import Iterator
from pathlib import Path

import pika
import psutil
import pytest
import redis
from pika.adapters.blocking_connection import BlockingChannel

import mqserve as serve
from tests.fuzz.material import bomb
from tests.fuzz.test_messages import Stranger, read_all, replicas_of, waiting
from tests.instances import Deploy, distributed_only, wait_until

pytestmark = [distributed_only, pytest.mark.row(29)]
WARM_UP = 10_000
GROWTH_MIB = {20_000: 8, 50_000: 20}  # since then: a leak of 1 KiB a message would be more
DEADLINE_S = 120.0


@pytest.fixture
def channel(broker_url: str) -> Iterator[BlockingChannel]:
    connection = pika.BlockingConnection(pika.URLParameters(broker_url))
    yield connection.channel()
    connection.close()


@pytest.mark.parametrize("messages", [20_000, pytest.param(50_000, marks=pytest.mark.long)])
def test_malformed_messages_leave_the_replica_as_it_was(
    channel: BlockingChannel, store_url: str, environment: dict[str, str], deploy: Deploy, tmp_path: Path, messages: int
) -> None:
    faulthandler.cancel_dump_traceback_later()  # of 120 s for one test: each part of this one has as many
    namespace, mark = environment["MQSERVE_NAMESPACE"], tmp_path / "opened"
    backend = deploy(read_all)
    stranger = Stranger(channel, f"{namespace}.requests", bomb(mark))
    with redis.Redis.from_url(store_url) as store:
        (before,) = replicas_of(store, namespace, backend)

        def is_over() -> bool:
            (now,) = replicas_of(store, namespace, backend)
            return waiting(channel, f"{namespace}.backend.{backend}.1") == 0 and now.get("running", 0) == 0 and now["at"] > published_ms

        used: list[float] = []
        for first, last in ((0, WARM_UP), (WARM_UP, messages)):
            for number in range(first, last):
                stranger.publish(backend, number)
            published_ms = time.time() * 1000 + 1000  # the beat of a second later says what is in its hands
            wait_until(is_over, DEADLINE_S, told=lambda: str(replicas_of(store, namespace, backend)))
            used.append(psutil.Process(before["pid"]).memory_info().rss / 2**20)
        (after,) = replicas_of(store, namespace, backend)
        assert serve.get_handle(backend).remote("alive").result(timeout=30).startswith("['alive'")
        assert (after["id"], after["pid"]) == (before["id"], before["pid"])
        assert (
            waiting(channel, f"{namespace}.dead.{backend}") == 10_000
        )  # as many as are kept: nothing was left in the queue, or taken twice
    print(f"{used[0]:.1f} MiB after {WARM_UP}, {used[1]:.1f} MiB after {messages}")
    assert used[1] - used[0] < GROWTH_MIB[messages], used
    assert not mark.exists()
