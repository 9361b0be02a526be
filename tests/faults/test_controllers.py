"""Three controllers: whichever of them dies, freezes or ends, another goes on, nothing runs twice and no request fails."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import mqserve as serve
from tests.faults.load import Load
from tests.faults.three_controllers import CHANGE_OF_LEADERS_S, Cluster, running_cluster
from tests.gates import Gate
from tests.instances import new_namespace, wait_until
from tests.tallies import Tally

KILLING_S = 60.0


@pytest.fixture(scope="module")
def whole_cluster(broker_url: str, store_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), broker_url, store_url, new_namespace("controllers")) as cluster:
        yield cluster


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Iterator[Cluster]:
    """The module's, with three controllers again whatever the last test did; backend and endpoint `b` go with the test."""
    whole_cluster.complete()
    yield whole_cluster
    whole_cluster.client.delete_endpoint("b")
    whole_cluster.client.delete_backend("b", force=True)
    wait_until(lambda: not whole_cluster.members.pids("replica"))


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


@pytest.mark.row(12)
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


@pytest.mark.row(13)
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
        assert old.wait() == 0
        assert cluster.members.has_let_go(old.pid), "it left a lead that has to lapse first"
        cluster.wait_for_another(old, CHANGE_OF_LEADERS_S)
        scale(cluster, 2)
    assert not load.failed


@pytest.mark.row(12)
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


def test_no_time_of_a_schedule_is_missed_or_fired_for_twice_while_leaders_are_killed(cluster: Cluster, tmp_path: Path) -> None:
    ran = Tally(tmp_path)

    def note(request: serve.ServeRequest) -> str:
        ran.note(request.headers["x-scheduled-for"])
        return str(request.headers["x-scheduled-for"])

    client = cluster.client
    client.create_backend("b", note)
    client.create_endpoint("b", backend="b")
    client.schedule("each-second", "b", cron="* * * * * *")
    until = time.monotonic() + KILLING_S
    kills = 0
    while time.monotonic() < until:
        came = len(ran)
        wait_until(lambda: len(ran) > came)  # noqa: B023
        leader = cluster.leader()
        leader.kill()
        kills += 1
        cluster.wait_for_another(leader, CHANGE_OF_LEADERS_S)
        cluster.complete()
    client.pause_schedule("each-second")
    last = client.list_schedules()["each-second"]
    assert last.last_at is not None
    assert datetime.fromisoformat(client.job(last.last_job).result(timeout=30)) == last.last_at
    client.delete_schedule("each-second")
    times = sorted(map(datetime.fromisoformat, ran.lines))
    seconds = (times[-1] - times[0]).total_seconds()
    assert times == [times[0] + timedelta(seconds=second) for second in range(int(seconds) + 1)], f"{kills} leaders were killed"
