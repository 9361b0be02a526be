"""What is said of an instance's health while Redis takes no writes, for whatever reason: soon, truly, and no longer than it is so.

The module has a Redis of its own, which each test mends.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

import mqserve as serve
from tests.conftest import running
from tests.gates import Gate
from tests.instances import NOISE_S, SECRET_KEY, CommandLine, Deploy, distributed_only, started, wait_until
from tests.servers import PrivateRabbitMQ, PrivateRedis

pytestmark = [distributed_only, pytest.mark.breaks_servers]

TOLD_WITHIN_S = 5 + NOISE_S


@pytest.fixture(scope="module")
def own_store() -> Iterator[PrivateRedis]:
    yield from running(PrivateRedis)


@pytest.fixture(scope="module")
def client(form: str, broker_url: str, own_store: PrivateRedis, shared_namespace: str) -> Iterator[serve.Client]:
    with started(broker_url=broker_url, store_url=own_store.url, namespace=shared_namespace) as client:
        yield client


@pytest.fixture
def shell(client: serve.Client, broker_url: str, own_store: PrivateRedis, shared_namespace: str, tmp_path: Path) -> CommandLine:
    return CommandLine(
        tmp_path,
        MQSERVE_BROKER_URL=broker_url,
        MQSERVE_STORE_URL=own_store.url,
        MQSERVE_SECRET_KEY=SECRET_KEY,
        MQSERVE_NAMESPACE=shared_namespace,
    )


def fail_to_save(store: PrivateRedis) -> None:
    """Its folder is gone, so the next snapshot fails, after which it takes no writes."""
    assert store._folder is not None
    shutil.rmtree(store._folder)
    store.say("CONFIG", "SET", "save", "3600 1")
    store.say("SET", "something", "to be saved")
    store.say("BGSAVE")
    wait_until(lambda: store.say("INFO", "persistence")["rdb_last_bgsave_status"] == "err")


class Refusal(NamedTuple):
    """One way in which Redis takes no writes, and what is said of it to anybody."""

    begin: Callable[[PrivateRedis], Any]
    end: Callable[[PrivateRedis], Any]
    words: str


REFUSALS = {
    "full": Refusal(lambda store: store.limit_memory("1", "noeviction"), lambda store: store.limit_memory(), "it is full"),
    "read-only": Refusal(
        lambda store: store.say("REPLICAOF", "127.0.0.1", "1"), lambda store: store.say("REPLICAOF", "NO", "ONE"), "it is a read-only copy"
    ),
    "cannot-save": Refusal(fail_to_save, lambda store: store.say("CONFIG", "SET", "save", ""), "it cannot save to its disk"),
    "misses-replicas": Refusal(
        lambda store: store.say("CONFIG", "SET", "min-replicas-to-write", "1"),
        lambda store: store.say("CONFIG", "SET", "min-replicas-to-write", "0"),
        "it misses replicas of its own",
    ),
    "rights-lost": Refusal(
        lambda store: store.say("ACL", "SETUSER", "default", "-hset", "-set", "-evalsha", "-eval"),
        lambda store: store.say("ACL", "SETUSER", "default", "+@all"),
        "it does not let this process write",
    ),
}


@pytest.fixture(params=REFUSALS)
def refusal(request: pytest.FixtureRequest, own_store: PrivateRedis) -> Iterator[Refusal]:
    refusal = REFUSALS[request.param]
    yield refusal
    refusal.end(own_store)


def is_ready(deploy: Deploy) -> bool:
    return httpx.get(f"{deploy.url}/-/readyz").status_code == 200


def red(deploy: Deploy) -> dict[str, Any]:
    """What readiness says, as soon as it is red."""
    wait_until(lambda: not is_ready(deploy))
    facts: dict[str, Any] = httpx.get(f"{deploy.url}/-/readyz").json()
    return facts


def work_behind(gate: Gate) -> Any:
    def work(request: Any) -> int:
        if request.method == "POST":
            gate.pass_through()
        return os.getpid()

    return work


@pytest.mark.row(9)
def test_callers_and_readiness_tell_why_nothing_can_be_stored_and_recover_by_themselves(
    deploy: Deploy, own_store: PrivateRedis, refusal: Refusal, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    url = deploy.at(work_behind(gate), sync_threads=2)
    pid = httpx.get(url).json()
    with ThreadPoolExecutor(1) as background:
        earlier = background.submit(lambda: httpx.post(url, timeout=90))
        wait_until(lambda: gate.came == 1)
        refusal.begin(own_store)
        began = time.monotonic()
        facts = red(deploy)
        assert (facts["store"], facts["why"]) == (False, {"store": refusal.words})
        answer = httpx.get(url, timeout=90)
        assert time.monotonic() - began < TOLD_WITHIN_S
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert answer.json()["detail"] == f"the store of results cannot be used now ({refusal.words}): try again later"
        gate.open()
        time.sleep(4)
        assert not earlier.done(), "its result waits for room"
        refusal.end(own_store)
        wait_until(lambda: is_ready(deploy))
        assert earlier.result().status_code == 200
    wait_until(lambda: httpx.get(url, timeout=90).json() == pid)


def replicas_of(told: dict[str, Any]) -> set[str]:
    """The backends of which there are replicas."""
    return {member["backend"] for member in told["members"] if member["kind"] == "replica"}


@pytest.mark.row(9)
def test_members_that_cannot_report_are_not_shown_as_gone(
    deploy: Deploy, own_store: PrivateRedis, shell: CommandLine, shared_namespace: str
) -> None:
    name = deploy(lambda request: "well")
    wait_until(lambda: replicas_of(json.loads(shell.run("status", "--json").stdout)) == {name})  # those of other tests are gone
    own_store.limit_memory("1", "noeviction")
    try:
        time.sleep(8)  # longer than a silent member is believed to live
        shown, told = shell.run("status"), json.loads(shell.run("status", "--json").stdout)
    finally:
        own_store.limit_memory()
    assert shown.returncode == 1
    assert " gone " not in shown.stdout and "takes no writes" in shown.stdout and "raise its maxmemory" in shown.stderr, shown
    assert told["store"]["state"] == "takes no writes"
    assert {(member["state"], member["said"]) for member in told["members"]} == {("unknown", "ready")}
    assert [(one["ready"], one["state"]) for one in told["backends"] if one["name"] == name] == [(1, "unknown")]
    wait_until(lambda: shell.run("status").returncode == 0)


@pytest.mark.row(9)
def test_who_asks_by_a_handle_is_told_soon_that_nothing_can_be_stored(
    client: serve.Client, deploy: Deploy, own_store: PrivateRedis
) -> None:
    handle = client.get_handle(deploy(lambda request: "well"))
    assert handle.remote().result(timeout=30) == "well"
    own_store.limit_memory("1", "noeviction")
    try:
        sent_before_it_was_noticed = handle.remote()
        time.sleep(1.5)
        began = time.monotonic()
        with pytest.raises(serve.StoreUnavailable, match="takes no writes: it is full"):
            handle.remote().result(timeout=60)
        assert time.monotonic() - began < TOLD_WITHIN_S
    finally:
        own_store.limit_memory()
    with suppress(serve.StoreUnavailable):  # where it was noticed late, what had just been sent is refused after the fact
        assert sent_before_it_was_noticed.result(timeout=60) == "well"
    assert handle.remote().result(timeout=30) == "well"


@pytest.mark.row(9)
def test_whose_time_is_spent_meanwhile_hears_of_the_store_and_not_to_add_replicas(
    deploy: Deploy, own_store: PrivateRedis, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    url = deploy.at(work_behind(gate))
    with ThreadPoolExecutor(1) as background:
        asked = background.submit(lambda: httpx.post(url, headers={"X-Request-Timeout-Seconds": "8"}, timeout=90))
        wait_until(lambda: gate.came == 1)
        time.sleep(2.5)
        own_store.limit_memory("1", "noeviction")
        try:
            gate.open()
            late = asked.result()
        finally:
            own_store.limit_memory()
    assert late.status_code == 504
    assert "no result" in late.json()["detail"] and "it is full" in late.json()["detail"], late.text


@pytest.mark.row(24)
@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_an_alarm_of_rabbitmq_is_said_to_callers_and_by_readiness(
    deploy: Deploy, broker_server: PrivateRabbitMQ, shell: CommandLine, kind: str
) -> None:
    url = deploy.at(lambda request: "well")
    assert httpx.get(url).text == "well"
    broker_server.alarm(kind)
    assert red(deploy)["why"] == {"broker": "it has an alarm, of its memory or its disk"}
    refused = httpx.get(url, timeout=90)
    assert refused.status_code == 503 and "it has an alarm" in refused.json()["detail"]
    wait_until(lambda: "it has an alarm" in shell.run("status").stdout)
    broker_server.calm()
    wait_until(lambda: is_ready(deploy))
    wait_until(lambda: httpx.get(url, timeout=90).status_code == 200)


def test_rights_on_rabbitmq_that_are_taken_away_are_noticed_and_given_back_are_used(
    deploy: Deploy, broker_server: PrivateRabbitMQ, shell: CommandLine
) -> None:
    url = deploy.at(lambda request: "well")
    assert httpx.get(url).text == "well"
    broker_server.ctl("set_permissions", "guest", "^$", "^$", ".*")
    broker_server.ctl("close_all_connections", "rights are looked at once in a channel's life")
    try:
        assert red(deploy)["why"] == {"broker": "it takes no messages"}
        assert httpx.get(url, timeout=90).status_code == 503
        wait_until(lambda: "lacks" in shell.run("status").stdout)
    finally:
        broker_server.ctl("set_permissions", "guest", ".*", ".*", ".*")
    wait_until(lambda: is_ready(deploy))
    wait_until(lambda: httpx.get(url, timeout=90).status_code == 200)
