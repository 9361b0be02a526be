"""Three controllers: whichever of them dies, freezes or ends, another goes on, nothing runs twice and no request fails."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import mqserve as serve
from tests.faults.load import Load
from tests.faults.members import Members
from tests.gates import Gate
from tests.instances import SECRET_KEY, CommandLine, Program, answers, wait_until
from tests.servers import free_port
from tests.tallies import Tally

CHANGE_OF_LEADERS_S = 10


class Cluster:
    """Three controllers, two nodes, an external proxy and a client, each but the client a process of its own."""

    def __init__(self, shell: CommandLine, client: serve.Client, members: Members, controllers: list[Program], url: str) -> None:
        self.shell = shell
        self.client = client
        self.members = members
        self.url = url
        self._controllers = {controller.pid: controller for controller in controllers}

    def leader(self) -> Program:
        return self._controllers[wait_until(lambda: self.members.leader()[0])]

    def wait_for_another(self, old: Program, deadline_s: float) -> Program:
        def another() -> Program | None:
            pid, _ = self.members.leader()
            return self._controllers[pid] if pid not in (0, old.pid) else None

        return wait_until(another, deadline_s)  # type: ignore[return-value]


@pytest.fixture
def cluster(distributed_shell: CommandLine, broker_url: str, store_url: str, namespace: str) -> Iterator[Cluster]:
    controllers = [distributed_shell.start("controller")]
    members = Members(store_url, namespace)
    wait_until(lambda: members.leader()[0])
    controllers += [distributed_shell.start("controller") for _ in range(2)]
    for number in (1, 2):
        distributed_shell.start("node", "--node-id", f"n{number}")
    port = free_port()
    distributed_shell.start("proxy", "--port", str(port))
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/-/healthz") and len(members.beats("node")) == 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MQSERVE_SECRET_KEY", SECRET_KEY)
        client = serve.connect(broker_url=broker_url, store_url=store_url, namespace=namespace)
    time.sleep(2)  # all of them have seen what there is
    try:
        yield Cluster(distributed_shell, client, members, controllers, f"http://127.0.0.1:{port}")
    finally:
        for controller in controllers:
            if not controller.ended:
                controller.signal(signal.SIGCONT)
        client.shutdown()
        members.close()
        assert all(controller.wait() in (0, -signal.SIGKILL) for controller in controllers), "they end with the instance"


def deploy(cluster: Cluster, made: Tally, num_replicas: int) -> str:
    class Noted:
        def __init__(self) -> None:
            made.note(os.getpid())

        def __call__(self, request: Any) -> str:
            return "served"

    cluster.client.create_backend("b", Noted, config={"num_replicas": num_replicas})
    cluster.client.create_endpoint("b", backend="b", route="/b")
    return f"{cluster.url}/b"


def scale(cluster: Cluster, num_replicas: int) -> None:
    cluster.client.update_backend_config("b", {"num_replicas": num_replicas})


def test_a_killed_leader_is_followed_by_another_that_adopts_what_runs(cluster: Cluster, tmp_path: Path) -> None:
    made = Tally(tmp_path)
    url = deploy(cluster, made, 2)
    leader, before = cluster.leader(), cluster.members.pids("replica")
    with Load(url) as load:
        leader.signal(signal.SIGKILL)
        with ThreadPoolExecutor(1) as background:
            scaling = background.submit(scale, cluster, 3)
            cluster.wait_for_another(leader, CHANGE_OF_LEADERS_S)
            scaling.result(60)
    assert not load.failed
    assert before < cluster.members.pids("replica") and len(made) == 3


def test_a_frozen_leader_that_wakes_up_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    made = Tally(tmp_path)
    url = deploy(cluster, made, 2)
    old = cluster.leader()
    with Load(url) as load:
        old.signal(signal.SIGSTOP)
        cluster.wait_for_another(old, CHANGE_OF_LEADERS_S)
        scale(cluster, 4)
        leader, epoch = cluster.members.leader()
        replicas = cluster.members.observed().replicas
        old.signal(signal.SIGCONT)
        until = time.monotonic() + 5
        while time.monotonic() < until:  # some of its comparisons long
            observed = cluster.members.observed()
            assert (observed.epoch, observed.replicas) == (epoch, replicas) and cluster.members.leader() == (leader, epoch)
            time.sleep(0.05)
    assert not load.failed and len(made) == 4 and not old.ended
    scale(cluster, 1)


def test_a_leader_that_ends_hands_over_at_once(cluster: Cluster, tmp_path: Path) -> None:
    url = deploy(cluster, Tally(tmp_path), 1)
    old = cluster.leader()
    with Load(url) as load:
        old.signal(signal.SIGTERM)
        cluster.wait_for_another(old, 4)
        assert old.wait() == 0
        scale(cluster, 2)
    assert not load.failed


def test_a_roll_out_whose_controller_is_killed_is_finished_by_the_next(cluster: Cluster, tmp_path: Path) -> None:
    gate, made = Gate(tmp_path), Tally(tmp_path)
    url = deploy(cluster, Tally(tmp_path), 3)

    class Newer:
        def __init__(self) -> None:
            made.note(os.getpid())
            gate.pass_through()

        def __call__(self, request: Any) -> str:
            return "newer"

    with Load(url) as load, ThreadPoolExecutor(1) as background:
        updating = background.submit(cluster.client.update_backend, "b", Newer)
        wait_until(lambda: gate.came == 1)
        cluster.leader().signal(signal.SIGKILL)
        gate.open()
        updating.result(90)
        wait_until(lambda: len(cluster.members.pids("replica")) == 3 and not cluster.members.beats("replica", state="draining"))
    assert not load.failed and load.texts == {"served", "newer"} and len(made) == 3
