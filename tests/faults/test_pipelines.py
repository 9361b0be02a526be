"""Pipelines whose replicas and controllers are killed: each stage has one recorded result, and the next stage got that one."""

import asyncio
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import mqserve as serve
from mqserve.broker.jobs import JobState
from tests.faults.three_controllers import CHANGE_OF_LEADERS_S, Cluster, running_cluster
from tests.instances import Deploy, new_namespace, wait_until
from tests.servers import PrivateRedis
from tests.tallies import Tally

pytestmark = pytest.mark.row(33)

STAGES, PIPELINES, KILLS = 3, 60, 3


@pytest.fixture
def cluster(broker_url: str, store_url: str, tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path, broker_url, store_url, new_namespace("pipelines")) as cluster:
        yield cluster


def stage(tally: Tally, number: int) -> Any:
    """Notes its process, and adds what no other run adds."""

    async def run(request: serve.ServeRequest) -> list[str]:
        tally.note(f"{number} {os.getpid()}")
        await asyncio.sleep(0.1)
        return [*request.data, f"{number} {os.urandom(8).hex()}"]

    return run


def test_each_stage_has_one_result_while_replicas_and_leaders_are_killed(cluster: Cluster, tmp_path: Path) -> None:
    client, tally = cluster.client, Tally(tmp_path)
    names = [f"stage-{number}" for number in range(STAGES)]
    with client.deploying():
        for number, name in enumerate(names):
            client.create_backend(name, stage(tally, number), config={"num_replicas": 2, "max_concurrent_queries": 4, "max_attempts": 10})
            client.create_endpoint(name, backend=name)
        client.create_pipeline("p", names)

    def has_run(runs: int) -> bool:
        return len(tally) >= runs

    jobs = [client.get_handle("p").submit([str(number)]) for number in range(PIPELINES)]
    for kill in range(KILLS):
        wait_until(partial(has_run, 20 + 40 * kill), told=lambda: tally)
        os.kill(int(tally.lines[-1].split()[1]), signal.SIGKILL)
        leader = cluster.leader()
        leader.kill()
        cluster.wait_for_another(leader, CHANGE_OF_LEADERS_S)
        cluster.complete()
    results = [job.result(timeout=120) for job in jobs]
    for number, (job, result) in enumerate(zip(jobs, results, strict=True)):
        status = job.status()
        assert status.state is JobState.SUCCEEDED and [one.state for one in status.stages] == [JobState.SUCCEEDED] * STAGES
        assert result[0] == str(number) and [part.split()[0] for part in result[1:]] == ["0", "1", "2"]
        of_stages = [client.job(one.id).result(timeout=30) for one in status.stages]
        assert of_stages == [result[: end + 2] for end in range(STAGES)], "the next one went on from the result that is recorded"
    attempts = sum(client.job(one.id).status().attempts for job in jobs for one in job.status().stages)
    assert attempts >= len(tally) >= PIPELINES * STAGES, "each run was in its record before it began"
    assert len(tally) <= PIPELINES * STAGES + KILLS * 4, "only what a killed replica had in hand ran again"
    for name in ("p", *names):
        (client.delete_pipeline if name == "p" else client.delete_endpoint)(name)


@pytest.mark.parametrize("form", ["distributed"], indirect=True)
def test_a_redis_that_lost_everything_loses_no_pipeline_whose_stage_waits(
    client: serve.Client, deploy: Deploy, tally: Tally, store_server: PrivateRedis, tmp_path: Path
) -> None:
    held = tmp_path / "held"
    held.touch()

    async def wait(request: serve.ServeRequest) -> list[str]:
        tally.note("second")
        while held.exists():
            await asyncio.sleep(0.02)
        return [*request.data, "second"]

    first, second = deploy(stage(tally, 0)), deploy(wait, max_concurrent_queries=1)
    client.create_pipeline("p", [first, second, first])
    jobs = [client.get_handle("p").submit([]) for _ in range(2)]  # of the second stage one runs then, and one waits
    wait_until(lambda: len(tally) == 3)
    wait_until(lambda: all(job.status().stages[1].state is not None for job in jobs))
    store_server.kill()
    store_server.start()
    held.unlink()
    for job in jobs:
        assert [part.split()[0] for part in job.result(timeout=120)] == ["0", "second", "0"]
        wait_until(lambda job=job: job.status().state is JobState.SUCCEEDED)  # type: ignore[misc]
    client.delete_pipeline("p")
