"""Row 12 of docs/reliability.md for a detached instance: its three processes bring each other back, and none comes back after its end."""

import itertools
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

import mqserve as serve
from mqserve.broker.store_keys import LEADER_TTL_S
from mqserve.instance.supervisor import LONGEST_PAUSE_S
from tests.conftest import running
from tests.faults.crowd import Crowd
from tests.faults.detached import BACK_WITHIN_S, THREE, Detached, files_left, keys_left
from tests.faults.members import Members
from tests.faults.servers_say import queues_of
from tests.instances import SECRET_KEY, CommandLine, wait_until
from tests.ports import free_port
from tests.servers import PrivateRedis

SUBSETS = [subset for size in (1, 2) for subset in itertools.combinations(THREE, size)]


@pytest.fixture
def detached(distributed_shell: CommandLine, namespace: str) -> Iterator[Detached]:
    detached = Detached(distributed_shell, namespace)
    yield detached
    detached.close()


def assert_nothing_is_left(detached: Detached, broker_url: str, store_url: str) -> None:
    wait_until(lambda: not detached.pids(), told=lambda: detached)
    assert not keys_left(store_url, detached.namespace)
    assert not queues_of(broker_url, detached.namespace, "b")
    assert not files_left(detached)
    quiet_until = time.monotonic() + 3
    while time.monotonic() < quiet_until:  # nor does anything come back
        assert not detached.pids(), detached
        time.sleep(0.1)


@pytest.mark.row(12)
def test_whichever_of_a_detached_instances_processes_are_killed_the_others_bring_them_back(
    detached: Detached, broker_url: str, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    detached.start()
    detached.deploy()
    monkeypatch.setenv("MQSERVE_SECRET_KEY", SECRET_KEY)
    client = serve.connect(broker_url=broker_url, store_url=store_url, namespace=detached.namespace)
    with Crowd(f"{detached.url}/b", timeout_s=10) as load:
        for subset in SUBSETS:
            load.wait_for(20)
            before, failed = detached.the_three(), len(load.failures)
            killed_at = time.monotonic()
            detached.kill(*subset)
            wait_until(lambda: set(detached.pids(*subset)) == set(subset) and detached.the_three() != before)  # noqa: B023
            wait_until(detached.serves, told=lambda: detached)
            client.create_backend("x", lambda request: None)  # a controller leads, and a node does as it says
            client.delete_backend("x")
            took_s = time.monotonic() - killed_at
            assert took_s < BACK_WITHIN_S, (subset, detached)
            after = detached.the_three()
            assert {role for role in THREE if after[role] != before[role]} == set(subset), (subset, detached)
            load.wait_for(20)
            if "node" not in subset:  # whose proxy and replicas end with it
                assert len(load.failures) == failed and set(load.statuses[-40:]) == {200}, (subset, load)
    client.shutdown()
    assert_nothing_is_left(detached, broker_url, store_url)


@pytest.mark.row(12)
def test_the_lead_of_a_killed_controller_that_its_starter_saw_ending_need_not_lapse(
    detached: Detached, store_url: str, namespace: str
) -> None:
    detached.start()
    members = Members(store_url, namespace)
    took_s = []
    for _ in range(3):
        old, epoch = wait_until(lambda: members.leader())
        detached.kill("controller")
        killed_at = time.monotonic()
        wait_until(lambda: members.leader()[0] not in (0, old) and members.leader()[1] > epoch)  # noqa: B023
        took_s.append(time.monotonic() - killed_at)
    members.close()
    assert min(took_s) < LEADER_TTL_S - 1, took_s  # a lead that is renewed every second lapses no sooner
    assert detached.shell.run("shutdown").returncode == 0


@pytest.mark.row(12)
@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_whatever_is_killed_while_an_instance_drains_nothing_of_it_is_left_nor_comes_back(
    detached: Detached, broker_url: str, store_url: str, subset: tuple[str, ...]
) -> None:
    detached.start()
    go_on = detached.shell.folder / "go on"
    slow = detached.shell.python(
        "import mqserve as serve, pathlib, time\n"
        "serve.connect()\n"
        "def slow(request):\n"
        f"    while not pathlib.Path({str(go_on)!r}).exists():\n"
        "        time.sleep(0.05)\n"
        "    return 'well'\n"
        "serve.create_backend('b', slow, config={'graceful_shutdown_timeout_s': 30})\n"
        "serve.create_endpoint('b', backend='b', route='/b')\n"
    )
    assert slow.returncode == 0, slow.stderr
    with ThreadPoolExecutor(2) as background:
        asked = background.submit(lambda: httpx.get(f"{detached.url}/b", timeout=60))
        time.sleep(0.5)  # it runs; where it does not yet, it drains all the same
        ending = background.submit(lambda: detached.shell.run("shutdown", deadline_s=120))
        wait_until(lambda: detached.shell.run("status").stdout.count("draining"), told=lambda: detached)
        detached.kill(*subset)
        go_on.touch()
        ended = ending.result()
        assert ended.returncode == 0, ended
        assert "node" in subset or asked.result().status_code == 200
    assert_nothing_is_left(detached, broker_url, store_url)


@pytest.mark.parametrize("broken", THREE)
def test_a_process_that_ends_at_once_is_tried_again_after_growing_pauses_and_its_words_are_shown(detached: Detached, broken: str) -> None:
    detached.start()
    detached.the_three()
    detached.break_starts_of(broken)
    before = detached.starts[broken]
    detached.kill(broken)
    began = time.monotonic()
    words = f"the {broken} ended soon after its start"
    wait_until(lambda: words in detached.shell.run("status").stdout, told=lambda: detached)
    while time.monotonic() < began + 10:
        time.sleep(0.1)
    tries = detached.starts[broken] - before
    assert 2 <= tries <= 8, f"{tries} in {time.monotonic() - began:.0f} s"  # 0.5, 1, 2, 4 and 8 s apart
    assert f"the {broken} is broken" in detached.log and f"the {broken} ended (exit code 7)" in detached.log
    detached.mend_starts()
    wait_until(lambda: detached.the_three(), LONGEST_PAUSE_S + BACK_WITHIN_S, told=lambda: detached)
    wait_until(lambda: words not in detached.shell.run("status").stdout, told=lambda: detached)
    assert detached.shell.run("shutdown").returncode == 0


def test_a_start_is_refused_while_the_supervisor_lives_and_no_controller_leads(detached: Detached) -> None:
    detached.start()
    detached.the_three()
    detached.break_starts_of("controller")
    detached.kill("controller")
    wait_until(lambda: "missing" in detached.shell.run("status").stdout, told=lambda: detached)
    detached.shell.file("app.py", "import mqserve as serve\n\n@serve.endpoint('/a')\ndef a(request): ...\n")
    for command in (["start"], ["run", "app.py"]):
        refused = detached.shell.run(*command, "--port", str(free_port()))
        assert refused.returncode == 1, refused
        assert "its supervisor on this machine is about to start its controller again" in refused.stderr, refused
    detached.mend_starts()
    wait_until(lambda: "missing" not in detached.shell.run("status").stdout, told=lambda: detached)
    assert detached.shell.run("shutdown").returncode == 0


def test_the_end_of_the_supervisor_ends_all_three_and_the_next_start_finds_what_was_deployed(
    detached: Detached, broker_url: str, store_url: str
) -> None:
    detached.start()
    detached.deploy()
    os.kill(detached.the_three()["supervisor"], signal.SIGTERM)
    wait_until(lambda: not detached.pids(), told=lambda: detached)
    assert not files_left(detached)
    detached.start()
    wait_until(detached.serves, told=lambda: detached)
    assert detached.shell.run("shutdown").returncode == 0
    assert_nothing_is_left(detached, broker_url, store_url)


def test_the_end_of_the_supervisor_ends_also_a_node_that_is_only_starting(detached: Detached) -> None:
    detached.start()
    before = detached.the_three()
    detached.kill("node")
    wait_until(lambda: detached.pids("node")["node"] not in ([], [before["node"]]), told=lambda: detached)
    os.kill(before["supervisor"], signal.SIGTERM)
    wait_until(lambda: not detached.pids(), told=lambda: detached)
    quiet_until = time.monotonic() + 5
    while time.monotonic() < quiet_until:
        assert not detached.pids(), detached
        time.sleep(0.1)
    assert not files_left(detached)
    detached.start()
    assert detached.shell.run("shutdown").returncode == 0


@pytest.mark.parametrize("told", ["controller", "node"])
def test_one_that_is_told_to_end_alone_comes_back(detached: Detached, told: str) -> None:
    detached.start()
    before = detached.the_three()
    os.kill(before[told], signal.SIGTERM)
    wait_until(lambda: detached.the_three()[told] != before[told], told=lambda: detached)
    assert detached.shell.run("shutdown").returncode == 0


@pytest.fixture(scope="module")
def own_store() -> Iterator[PrivateRedis]:
    yield from running(lambda: PrivateRedis(keeps_data=True))


@pytest.mark.breaks_servers
@pytest.mark.parametrize("survivor", THREE)
def test_who_dies_while_redis_is_away_is_back_once_redis_is(
    distributed_shell: CommandLine, namespace: str, own_store: PrivateRedis, broker_url: str, survivor: str
) -> None:
    detached = Detached(distributed_shell.with_variables(MQSERVE_STORE_URL=own_store.url), namespace)
    try:
        detached.start()
        detached.deploy()
        before = detached.the_three()
        own_store.kill()
        detached.kill(*(role for role in THREE if role != survivor))
        for _ in range(20):
            time.sleep(0.1)
            assert set(detached.pids(*THREE)[survivor]) == {before[survivor]}, detached
        own_store.start()
        wait_until(detached.serves, told=lambda: detached)
        assert detached.the_three()[survivor] == before[survivor]
        assert detached.shell.run("shutdown").returncode == 0
        assert_nothing_is_left(detached, broker_url, own_store.url)
    finally:
        detached.close()
        own_store.mend()
