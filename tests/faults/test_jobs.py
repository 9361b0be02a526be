"""Jobs whose replica dies, freezes or drains, whose servers restart, and those of direct publishers."""

import asyncio
import json
import os
import signal
import time
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

import mqserve as serve
from mqserve.broker.jobs import JobState
from tests.gates import Gate
from tests.instances import NOISE_S, CommandLine, Deploy, distributed_only, wait_until
from tests.servers import PrivateRabbitMQ, PrivateRedis
from tests.tallies import Tally

pytestmark = [distributed_only, pytest.mark.row(33)]

AGAIN_WITHIN_S = 15.0


def ended(job: serve.Job) -> serve.JobStatus:
    wait_until(lambda: job.status().state.is_final, told=job.status)
    return job.status()


def waiting_at(gate: Gate, tally: Tally) -> Any:
    """Notes its process and the number of its run, then waits at the gate."""

    def handle(request: serve.ServeRequest) -> int:
        tally.note(f"{os.getpid()} {request.attempt}")
        gate.pass_through()
        return int(request.attempt)

    return handle


def pid_of(line: str) -> int:
    return int(line.split()[0])


def test_a_job_whose_replica_was_killed_runs_again_within_15_s(client: serve.Client, deploy: Deploy, tally: Tally, gate: Gate) -> None:
    job = client.get_handle(deploy(waiting_at(gate, tally), num_replicas=2)).submit()
    wait_until(lambda: gate.came == 1)
    os.kill(pid_of(tally.lines[0]), signal.SIGKILL)
    wait_until(lambda: gate.came == 2, AGAIN_WITHIN_S + NOISE_S)
    gate.open()
    assert job.result(30) == 2
    status = ended(job)
    assert (status.state, status.attempts) == (JobState.SUCCEEDED, 2)


def test_a_replica_that_wakes_up_after_another_took_its_job_changes_nothing(
    client: serve.Client, deploy: Deploy, tally: Tally, gate: Gate, joining: CommandLine
) -> None:
    def by_name(request: serve.ServeRequest) -> int:
        tally.note(f"{os.getpid()} {request.data}")
        if request.attempt == 1 and request.data in ("a", "b"):
            gate.pass_through(request.data)
        return os.getpid()

    name = deploy(by_name)
    other = joining.start("replica", name)  # one that no node kills while it is frozen
    handle = client.get_handle(name)
    wait_until(lambda: handle.remote("is it there?").result(60) == other.pid)
    jobs = {word: handle.submit(word) for word in ("a", "b")}
    wait_until(lambda: gate.came == 2)
    (word,) = [line.split()[1] for line in tally.lines if line in (f"{other.pid} a", f"{other.pid} b")]
    other.signal(signal.SIGSTOP)
    try:
        gate.open()
        assert jobs["b" if word == "a" else "a"].result(30) != other.pid
        winner = jobs[word].result(120)
        assert winner != other.pid
    finally:
        other.signal(signal.SIGCONT)
    wait_until(lambda: handle.submit("c").result(60) == other.pid, 60)  # it takes jobs again, so it has settled what it had
    assert jobs[word].result(30) == winner
    assert ended(jobs[word]).attempts == 2


def test_a_job_that_kills_its_replicas_is_set_aside(client: serve.Client, deploy: Deploy, tally: Tally, operator: CommandLine) -> None:
    def deadly(request: serve.ServeRequest) -> None:
        tally.note("run")
        os._exit(1)

    name = deploy(deadly, max_attempts=2)
    job = client.get_handle(name).submit()
    with pytest.raises(serve.RemoteError, match="Poison"):
        job.result(90)
    assert len(tally) == 2, "each is in the record before it begins"
    assert (ended(job).state, ended(job).attempts) == (JobState.FAILED, 2)
    (letter,) = dead_letters(operator, name)
    assert len(letter["attempts"]) == 2


def test_a_drain_gives_a_job_back_and_it_begins_elsewhere_at_once(client: serve.Client, deploy: Deploy, tally: Tally, gate: Gate) -> None:
    name = deploy(waiting_at(gate, tally), graceful_shutdown_timeout_s=0.5)
    job = client.get_handle(name).submit()
    wait_until(lambda: gate.came == 1)
    began = time.monotonic()
    client.update_backend(name, waiting_at(gate, tally))
    wait_until(lambda: gate.came == 2)
    gate.open()
    assert job.result(30) == 1, "the run that was given back is no attempt"
    assert time.monotonic() - began < 60
    assert ended(job).attempts == 1


def one_runs_and_one_waits(handle: serve.Handle, gate: Gate) -> tuple[serve.Job, serve.Job]:
    running = handle.submit()
    wait_until(lambda: gate.came == 1)
    return running, handle.submit()


def test_a_job_that_waited_or_ran_while_rabbitmq_restarted_is_done(
    client: serve.Client, deploy: Deploy, tally: Tally, gate: Gate, broker_server: PrivateRabbitMQ
) -> None:
    running, waiting = one_runs_and_one_waits(client.get_handle(deploy(waiting_at(gate, tally))), gate)
    broker_server.stop()
    broker_server.start()
    gate.open()
    assert running.result(120) == 1 and waiting.result(120) == 1
    assert len(tally) == 2, "a redelivered one that still runs is not run a second time"


@pytest.fixture
def operator(environment: dict[str, str], joining: CommandLine) -> CommandLine:
    return joining


def dead_letters(shell: CommandLine, backend: str) -> list[dict[str, Any]]:
    done = shell.run("dead", "list", backend, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def channel(environment: dict[str, str]) -> Iterator[BlockingChannel]:
    with pika.BlockingConnection(pika.URLParameters(environment["MQSERVE_BROKER_URL"])) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel


def test_a_direct_publisher_sends_a_job_by_its_message_id_and_finds_it_again(
    client: serve.Client, deploy: Deploy, environment: dict[str, str], channel: BlockingChannel
) -> None:
    name = deploy(lambda request: sum(request.data))
    key, replies = uuid.uuid4().hex, str(channel.queue_declare("", exclusive=True).method.queue)
    properties = pika.BasicProperties(content_type="application/json", message_id=key, delivery_mode=2, reply_to=replies)
    channel.basic_publish(f"{environment['MQSERVE_NAMESPACE']}.jobs", name, b"[1, 2]", properties, mandatory=True)
    wait_until(lambda: (received := channel.basic_get(replies, auto_ack=True)) and received[2] == b"3")
    job = client.job(key, backend=name)
    assert job.result(30) == 3 and ended(job).state is JobState.SUCCEEDED
    channel.basic_publish(f"{environment['MQSERVE_NAMESPACE']}.jobs", name, b"[7]", properties, mandatory=True)
    wait_until(lambda: (received := channel.basic_get(replies, auto_ack=True)) and received[2] == b"3")
    assert ended(job).attempts == 1, "the same id is the same job"


def test_a_direct_publishers_job_is_tried_again_like_any_other(
    client: serve.Client, deploy: Deploy, environment: dict[str, str], channel: BlockingChannel, tally: Tally
) -> None:
    def flaky(request: serve.ServeRequest) -> int:
        tally.note(request.data)
        if request.attempt == 1:
            raise ConnectionError("not yet")
        return int(request.attempt)

    name, key = deploy(flaky, retry=serve.Retry(on=(OSError,), backoff_s=0.1)), uuid.uuid4().hex
    properties = pika.BasicProperties(content_type="text/plain", message_id=key, delivery_mode=2)
    channel.basic_publish(f"{environment['MQSERVE_NAMESPACE']}.jobs", name, b"published", properties, mandatory=True)
    assert client.job(key, backend=name).result(60) == 2
    assert tally.lines == ["published"] * 2


def test_a_direct_publisher_may_send_a_job_without_an_id(
    client: serve.Client, deploy: Deploy, environment: dict[str, str], channel: BlockingChannel, tally: Tally
) -> None:
    name = deploy(lambda request: tally.note(request.data))
    properties = pika.BasicProperties(content_type="text/plain", delivery_mode=2)
    channel.basic_publish(f"{environment['MQSERVE_NAMESPACE']}.jobs", name, b"anonymous", properties, mandatory=True)
    wait_until(lambda: tally.lines == ["anonymous"])


def test_a_job_that_has_had_all_its_attempts_is_a_dead_letter_with_its_history_and_a_retry_starts_afresh(
    client: serve.Client, deploy: Deploy, operator: CommandLine, tally: Tally
) -> None:
    def fail(request: serve.ServeRequest) -> None:
        tally.note(request.attempt)
        raise ConnectionError(f"run {request.attempt}")

    name = deploy(fail, retry=serve.Retry(attempts=3, on=(OSError,), backoff_s=0.1))
    job = client.get_handle(name).submit()
    with pytest.raises(ConnectionError, match="run 3"):
        job.result(60)
    (letter,) = dead_letters(operator, name)
    assert "run 3" in letter["reason"]
    assert ["run 1" in letter["attempts"][0]["ended"], "run 3" in letter["attempts"][2]["ended"]] == [True, True]
    assert operator.run("dead", "retry", name, "--all").returncode == 0
    wait_until(lambda: tally.lines == ["1", "2", "3"] * 2)


def test_a_redis_that_lost_everything_loses_no_job_that_runs_or_waits(
    client: serve.Client, deploy: Deploy, tally: Tally, gate: Gate, store_server: PrivateRedis
) -> None:
    running, waiting = one_runs_and_one_waits(client.get_handle(deploy(waiting_at(gate, tally))), gate)
    store_server.kill()
    store_server.start()
    gate.open()
    assert running.result(120) == 1 and waiting.result(120) == 1
    assert running.status().state is JobState.SUCCEEDED


def test_no_job_is_lost_while_replicas_are_killed(client: serve.Client, deploy: Deploy, tally: Tally) -> None:
    async def work(request: serve.ServeRequest) -> int:
        tally.note(os.getpid())
        await asyncio.sleep(0.05)
        return int(request.data)

    def has_begun(runs: int) -> bool:
        return len(tally) > runs

    handle = client.get_handle(deploy(work, num_replicas=2, max_concurrent_queries=8, max_attempts=10))
    jobs = [handle.submit(number) for number in range(400)]
    for killed in range(3):
        wait_until(partial(has_begun, 100 * killed + 50))
        os.kill(int(tally.lines[-1]), signal.SIGKILL)
    assert [job.result(120) for job in jobs] == list(range(400))
    states = [ended(job) for job in jobs]
    assert {status.state for status in states} == {JobState.SUCCEEDED}
    assert sum(status.attempts for status in states) >= len(tally), "each run was in its record before it began"
