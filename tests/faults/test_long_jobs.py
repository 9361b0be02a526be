"""Jobs that run for longer than RabbitMQ lets consumers hold messages, by its configuration: they run once, again where their replica is
killed, and a replica that was frozen meanwhile changes nothing.

From 3.12 on the queue's own timeout counts, and RabbitMQ takes none of them back. Before, it takes each back again and again, if its
operator has not told us of the configuration, and what keeps the second copy from running is the lease.
"""

import asyncio
import faulthandler
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import pika
import pytest

import mqserve as serve
from mqserve.broker.jobs import JobState
from tests.instances import NOISE_S, CommandLine, Deploy, Program, distributed_only, wait_until
from tests.servers import PrivateRabbitMQ
from tests.tallies import Tally

pytestmark = [distributed_only, pytest.mark.row(33)]

AGAIN_WITHIN_S = 15.0
TAKEN_OVER_S = 60.0  # from a frozen replica: RabbitMQ's heartbeats (20 to 30 s), and what is left of the lease
DEFAULTS_MS = {"consumer_timeout": 1_800_000, "channel_tick_interval": 60_000}
TAKEN_BACK = "has timed out waiting for"  # in RabbitMQ's log, of a consumer


class Scale(NamedTuple):
    consumer_timeout_s: float
    looked_every_s: float
    run_s: float


QUICK, AS_PROMISED = Scale(4, 1, 16), Scale(60, 5, 240)


@pytest.fixture(scope="module", params=[QUICK, pytest.param(AS_PROMISED, marks=pytest.mark.long)], ids=["quick", "four minutes"])
def scale(request: pytest.FixtureRequest) -> Scale:
    found: Scale = request.param
    return found


@pytest.fixture(scope="module")
def broker_url(session_broker: PrivateRabbitMQ, scale: Scale) -> Iterator[str]:
    """A RabbitMQ that takes a message back from its consumer after that time, and says so soon."""
    set_ms(session_broker, consumer_timeout=scale.consumer_timeout_s * 1000, channel_tick_interval=scale.looked_every_s * 1000)
    yield session_broker.url
    set_ms(session_broker, **DEFAULTS_MS)


def set_ms(server: PrivateRabbitMQ, **settings: float) -> None:
    for setting, value_ms in settings.items():
        server.eval(f"application:set_env(rabbit, {setting}, {value_ms:.0f})")


def heeds_the_queue(server: PrivateRabbitMQ) -> bool:
    return tuple(map(int, re.findall(r"\d+", server.eval("rabbit_misc:version()"))[:2])) >= (3, 12)


def hold_a_message(url: str, within_s: float) -> float:
    """Holds a message of a queue of its own until RabbitMQ ends that, and returns after how long it did."""
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        queue = str(channel.queue_declare("", exclusive=True).method.queue)
        channel.basic_publish("", queue, b"held")
        channel.basic_consume(queue, lambda *_: None)
        began = time.monotonic()
        while channel.is_open:
            assert time.monotonic() < began + within_s, f"RabbitMQ lets a consumer hold a message for {within_s:g} s"
            connection.process_data_events(0.5)
        return time.monotonic() - began


PROBE = "probe"


def slow_at_first(tally: Tally, run_s: float) -> Callable[[serve.ServeRequest], Any]:
    """The first run of a job takes that long and tells that it goes on; others are quick, and so is a probe, which says where it ran."""

    async def handle(request: serve.ServeRequest) -> Any:
        if request.data == PROBE:
            return os.getpid()
        tally.note(f"{request.data} {os.getpid()}")
        until = time.monotonic() + run_s
        while request.attempt == 1 and time.monotonic() < until:
            serve.progress(0.5, "first run")
            await asyncio.sleep(0.5)
        tally.note(f"{request.data}-ended {os.getpid()}")
        return f"run {request.attempt}"

    return handle


class Runs:
    """Those of one job, as its handler noted them."""

    def __init__(self, tally: Tally, word: str) -> None:
        self._tally = tally
        self._word = word

    def __repr__(self) -> str:
        return f"<Runs of {self._word!r} in {self.pids}, ended in {self.ended}>"

    @property
    def pids(self) -> list[int]:
        return self._of(self._word)

    @property
    def ended(self) -> list[int]:
        return self._of(f"{self._word}-ended")

    def _of(self, wanted: str) -> list[int]:
        return [int(pid) for word, pid in map(str.split, self._tally.lines) if word == wanted]

    def wait_for(self, count: int, within_s: float = 30.0) -> None:
        wait_until(lambda: len(self.pids) == count, within_s, told=lambda: self)


class FrozenSoon(NamedTuple):
    """A job that runs in a replica which no node kills while it is frozen."""

    job: serve.Job
    runs: Runs
    replica: Program
    handle: Any

    def wait_until_it_serves(self) -> None:
        wait_until(lambda: self.handle.remote(PROBE).result(60) == self.replica.pid)

    @classmethod
    def submit(cls, client: serve.Client, name: str, joining: CommandLine, tally: Tally) -> Self:
        """Submits jobs until one runs there; the others are of no interest."""
        replica, handle = joining.start("replica", name), client.get_handle(name)
        wait_until(lambda: handle.remote(PROBE).result(60) == replica.pid)
        for number in range(10):
            job, runs = handle.submit(f"frozen-{number}"), Runs(tally, f"frozen-{number}")
            runs.wait_for(1)
            if runs.pids == [replica.pid]:
                return cls(job, runs, replica, handle)
        pytest.fail("no job went to the second replica")


def test_a_job_may_run_for_longer_than_consumers_may_hold_messages(
    client: serve.Client, deploy: Deploy, joining: CommandLine, tally: Tally, session_broker: PrivateRabbitMQ, scale: Scale
) -> None:
    faulthandler.cancel_dump_traceback_later()  # of 120 s for one test
    taken_back = session_broker.log.count(TAKEN_BACK)
    handler = slow_at_first(tally, scale.run_s)
    whole, killed = Runs(tally, "whole"), Runs(tally, "killed")
    whole_job, killed_job = (client.get_handle(deploy(handler, num_replicas=2)).submit(word) for word in ("whole", "killed"))
    frozen = FrozenSoon.submit(client, deploy(handler), joining, tally)
    for runs in (whole, killed):
        runs.wait_for(1)
    assert scale.consumer_timeout_s <= hold_a_message(session_broker.url, scale.run_s)

    os.kill(killed.pids[0], signal.SIGKILL)
    killed.wait_for(2, AGAIN_WITHIN_S + NOISE_S)
    assert killed_job.result(30) == "run 2"

    frozen.replica.signal(signal.SIGSTOP)
    try:
        frozen.runs.wait_for(2, TAKEN_OVER_S)
        assert frozen.job.result(30) == "run 2"
        before = frozen.job.status()
    finally:
        frozen.replica.signal(signal.SIGCONT)
    frozen.wait_until_it_serves()

    assert whole_job.result(scale.run_s + 60) == "run 1"
    wait_until(lambda: len(frozen.runs.ended) == 2, scale.run_s, told=lambda: frozen.runs)
    frozen.wait_until_it_serves()
    assert [len(runs.pids) for runs in (whole, killed, frozen.runs)] == [1, 2, 2], "none ran beside another run, nor after one"
    assert (before.state, before.attempts) == (JobState.SUCCEEDED, 2)
    assert frozen.job.status() == before and client.job(frozen.job.id).result(30) == "run 2"
    if heeds_the_queue(session_broker):
        assert session_broker.log.count(TAKEN_BACK) == taken_back + 1, "the one that the test held; none of the jobs"
    else:
        assert session_broker.log.count(TAKEN_BACK) > taken_back + 1
