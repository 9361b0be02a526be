"""A group of a thousand and the job that follows it, while replicas and controllers are killed."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

import mqserve as serve
from tests.faults.test_controllers import cluster, whole_cluster
from tests.faults.three_controllers import CHANGE_OF_LEADERS_S, Cluster
from tests.instances import wait_until
from tests.tallies import Tally

__all__ = ["cluster", "whole_cluster"]

MEMBERS = 1000


@pytest.fixture
def adding(cluster: Cluster, tmp_path: Path) -> Tally:
    """What the endpoint `add` was given: the lengths of the lists that it has added up."""
    added = Tally(tmp_path)

    def add(request: serve.ServeRequest) -> list[int]:
        added.note(len(request.data))
        return [len(request.data), sum(request.data)]

    cluster.client.create_backend("add", add)
    cluster.client.create_endpoint("add", backend="add")
    return added


def test_a_chord_of_a_thousand_follows_once_while_replicas_and_leaders_are_killed(
    cluster: Cluster,
    adding: Tally,
    tmp_path: Path,
) -> None:
    ran = Tally(tmp_path)

    async def work(request: serve.ServeRequest) -> int:
        ran.note(os.getpid())
        await asyncio.sleep(0.05)
        return int(request.data)

    client = cluster.client
    client.create_backend("b", work, config={"num_replicas": 2, "max_concurrent_queries": 8, "max_attempts": 20})
    client.create_endpoint("b", backend="b")
    group = client.submit_many(client.get_handle("b"), range(MEMBERS), then=client.get_handle("add"))
    assert group.then is not None
    for runs in (100, 350, 600):
        wait_until(lambda: len(ran) > runs, 60)  # noqa: B023
        with suppress(ProcessLookupError):
            os.kill(int(ran.lines[-1]), signal.SIGKILL)
        leader = cluster.leader()
        leader.kill()
        cluster.wait_for_another(leader, CHANGE_OF_LEADERS_S)
        cluster.complete()
    wait_until(lambda: group.status().done > MEMBERS - 20, 120, told=group.status)
    leader = cluster.leader()
    leader.kill()
    assert group.then.result(120) == [MEMBERS, sum(range(MEMBERS))]
    cluster.wait_for_another(leader, CHANGE_OF_LEADERS_S)
    assert group.results(30) == list(range(MEMBERS))
    assert group.status() == serve.GroupStatus(MEMBERS, 0, MEMBERS, 0, 0, 0)
    statuses = [job.status() for job in group.jobs]
    assert all(status.state is serve.JobState.SUCCEEDED for status in statuses)
    assert len(ran) <= sum(status.attempts for status in statuses), "each run was in its record before it began"
    assert adding.lines == [str(MEMBERS)] and group.then.status().attempts == 1
    client.delete_endpoint("add")
    client.delete_backend("add")


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.03, 0.1])
def test_a_leader_that_is_killed_when_a_group_is_complete_leaves_its_chord_to_the_next(
    cluster: Cluster,
    adding: Tally,
    seconds: float,
) -> None:
    client = cluster.client
    client.create_backend("b", lambda request: request.data, config={"num_replicas": 2})
    client.create_endpoint("b", backend="b")
    leader = cluster.leader()
    group = client.submit_many(client.get_handle("b"), range(100), then=client.get_handle("add"))
    wait_until(lambda: group.status().done == 100)
    asyncio.run(asyncio.sleep(seconds))
    leader.kill()
    assert group.then is not None and group.then.result(60) == [100, 4950]
    cluster.wait_for_another(leader, CHANGE_OF_LEADERS_S)
    assert adding.lines == ["100"] and group.then.status().attempts == 1
    client.delete_endpoint("add")
    client.delete_backend("add")
