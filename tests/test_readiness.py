"""`/-/readyz` is red until the declared routes are served, and no longer: for load balancers, which send nothing before."""

import json
import urllib.error
import urllib.request
from typing import Any

import msgspec
import pytest

from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.controller.state.documents import Backend, Desired, Endpoint, Observed
from mqserve.proxy.readiness import DOWN_AFTER_MS, Readiness
from tests.instances import CommandLine, answers, wait_until
from tests.ports import free_port

ROUTED = Desired(
    instance="i",
    backends={name: Backend(name, "sha", name) for name in ("a", "b", "handles-only")},
    endpoints={
        "a": Endpoint("a", "/a", ("GET",), {"a": 0.5, "b": 0.5}),
        "h": Endpoint("h", None, ("GET",), {"handles-only": 1.0}),
    },
)
SERVED = Observed(serving=("a", "b"))


@pytest.fixture
def store() -> EmbeddedStore:
    return EmbeddedStore()


def waits_for(readiness: Readiness) -> str:
    ready, facts = readiness.look(EmbeddedQueue())
    assert ready == ("why" not in facts) == facts["routes"]
    return str(facts.get("why", {}).get("routes", ""))


def test_a_proxy_that_knows_of_no_instance_is_not_ready(store: EmbeddedStore) -> None:
    assert waits_for(Readiness(store)) == "no instance is there yet"


def test_an_instance_that_declares_nothing_is_ready(store: EmbeddedStore) -> None:
    readiness = Readiness(store)
    readiness.follow(Desired(instance="i"), None)
    assert not waits_for(readiness)


@pytest.mark.parametrize(
    ("serving", "waiting"), [((), 2), (("a",), 1), (("a", "b"), 0), (None, 0)], ids=["none", "one", "both", "an-older-controller"]
)
def test_a_proxy_is_ready_once_each_backend_with_a_route_has_a_replica(
    store: EmbeddedStore, serving: tuple[str, ...] | None, waiting: int
) -> None:
    readiness = Readiness(store)
    readiness.follow(ROUTED, Observed(serving=serving))
    assert waits_for(readiness) == (f"no replica is ready yet of {waiting} backends that have a route" if waiting else "")


def test_a_backend_that_is_down_for_long_keeps_no_proxy_out_of_service(store: EmbeddedStore) -> None:
    readiness = Readiness(store)
    for down_for_ms, is_ready in ((1000, False), (DOWN_AFTER_MS + 1000, True)):
        readiness.follow(ROUTED, Observed(serving=("a",), down_since={"b": store.now_ms() - down_for_ms}))
        assert (not waits_for(readiness)) is is_ready


def test_what_was_served_once_stays_so_until_another_instance_comes(store: EmbeddedStore) -> None:
    readiness = Readiness(store)
    readiness.follow(ROUTED, SERVED)
    assert not waits_for(readiness)
    readiness.follow(ROUTED, Observed(serving=()))
    assert not waits_for(readiness), "its other routes are served"
    readiness.follow(msgspec.structs.replace(ROUTED, instance="another"), Observed(serving=()))
    assert waits_for(readiness)


def test_documents_that_are_lost_change_nothing_and_an_instance_that_was_shut_down_is_over(store: EmbeddedStore) -> None:
    readiness = Readiness(store)
    readiness.follow(ROUTED, SERVED)
    assert not waits_for(readiness)
    readiness.follow(None, None)
    assert not waits_for(readiness)
    readiness.follow(msgspec.structs.replace(ROUTED, closing=True), SERVED)
    assert not waits_for(readiness), "it drains, and answers what comes"
    readiness.follow(None, None)
    assert waits_for(readiness) == "the instance was shut down"


# The real ones.

SLOW = """
import time
from pathlib import Path
import mqserve as serve

@serve.endpoint("/quick")
def quick(request):
    return "quick"

@serve.endpoint("/slow")
class Slow:
    def __init__(self):
        while not Path({go_on!r}).exists():
            time.sleep(0.01)

    def __call__(self, request):
        return "slow"
"""


def readiness_of(port: int) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/readyz", timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as red:
        return red.code, json.load(red)
    except OSError:
        return 0, {}


@pytest.mark.parametrize("form", ["embedded", "distributed"])
def test_a_run_is_ready_once_all_that_its_file_declares_is_deployed(form: str, request: pytest.FixtureRequest) -> None:
    shell: CommandLine = request.getfixturevalue("shell" if form == "embedded" else "distributed_shell")
    go_on, port = shell.folder / "go-on", free_port()
    program = shell.start("run", shell.file("app.py", SLOW.format(go_on=str(go_on))), "--port", str(port))
    program.wait_for("quick is ready")
    assert not answers(f"http://127.0.0.1:{port}/quick"), "all that the file declares is served together"
    status, facts = readiness_of(port)
    assert (status, facts["routes"], facts["why"]) == (503, False, {"routes": "not all that was declared is deployed yet"})
    go_on.touch()
    program.wait_for("Serving on")
    assert answers(f"http://127.0.0.1:{port}/quick") and answers(f"http://127.0.0.1:{port}/slow")
    assert readiness_of(port) == (200, {"ready": True, "broker": True, "store": True, "routes": True})


def test_a_proxy_is_not_ready_before_there_is_an_instance_nor_after_its_end(distributed_shell: CommandLine) -> None:
    shell, port = distributed_shell, free_port()
    proxy = shell.start("proxy", "--port", str(port))
    wait_until(lambda: readiness_of(port)[0] == 503, told=lambda: proxy.output)
    assert readiness_of(port)[1]["why"] == {"routes": "no instance is there yet"}
    shell.start("controller")
    wait_until(lambda: readiness_of(port)[0] == 200, told=lambda: proxy.output)
    assert shell.run("shutdown").returncode == 0
    wait_until(lambda: readiness_of(port)[1].get("why") == {"routes": "the instance was shut down"})
