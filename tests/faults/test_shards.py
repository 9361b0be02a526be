"""A backend with several queues (`queue_shards`) keeps the promises of one: its replicas and its broker may die."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import mqserve as serve
from tests.faults.members import Members
from tests.instances import Deploy, distributed_only, wait_until
from tests.tallies import Tally

pytestmark = distributed_only

REQUESTS = 150


def working(tally: Tally) -> Any:
    """Notes its process and the request, and takes a moment."""

    def handle(request: Any) -> Any:
        tally.note(f"{os.getpid()} {request.data}")
        time.sleep(0.01)
        return request.data

    return handle


def test_a_killed_replica_loses_no_request_of_any_queue(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    handle = client.get_handle(deploy(working(tally), queue_shards=3, num_replicas=2))
    refs = [handle.remote(number) for number in range(REQUESTS)]
    killed = set[str]()
    while len(killed) < 2:
        first_of_another = wait_until(lambda: next((pid for line in tally.lines if (pid := line.split()[0]) not in killed), ""))
        os.kill(int(first_of_another), signal.SIGKILL)
        killed.add(first_of_another)
    assert serve.get(refs, timeout=60) == list(range(REQUESTS))
    assert {int(line.split()[1]) for line in tally.lines} == set(range(REQUESTS))


def test_a_queue_with_more_or_fewer_shards_loses_nothing_though_a_replica_is_killed(
    client: serve.Client, deploy: Deploy, tmp_path: Path
) -> None:
    tally = Tally(tmp_path)
    name = deploy(working(tally), queue_shards=3, num_replicas=2)
    refs = [client.get_handle(name).remote(number) for number in range(REQUESTS)]
    os.kill(int(wait_until(lambda: tally.lines)[0].split()[0]), signal.SIGKILL)
    client.update_backend_config(name, {"queue_shards": 1})
    refs += [client.get_handle(name).remote(number) for number in range(REQUESTS, 2 * REQUESTS)]
    client.update_backend_config(name, {"queue_shards": 2})
    assert serve.get(refs, timeout=60) == list(range(2 * REQUESTS))


def test_a_killed_controller_makes_all_queues_of_another_number_in_the_end(
    client: serve.Client, deploy: Deploy, members: Members, tmp_path: Path
) -> None:
    tally = Tally(tmp_path)
    name = deploy(working(tally), queue_shards=2)
    refs = [client.get_handle(name).remote(number) for number in range(REQUESTS)]
    os.kill(members.leader()[0], signal.SIGKILL)
    client.update_backend_config(name, {"queue_shards": 3})
    refs += [client.get_handle(name).remote(number) for number in range(REQUESTS, 2 * REQUESTS)]
    assert serve.get(refs, timeout=60) == list(range(2 * REQUESTS))
