"""Whoever registers a convertor may use it at once: the call waits until the replicas know it, too. In both forms."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.convertors import Convertor

import mqserve as serve
from mqserve.client.effects import Seen
from mqserve.controller.state.beats import SILENT_AFTER_S, MemberState, ProxyBeat, ReplicaBeat
from mqserve.controller.state.documents import Observed
from tests.gates import Gate
from tests.instances import Deploy, distributed_only, new_name, wait_until


class Shout(Convertor[str]):
    regex = "[A-Z]+"

    def convert(self, value: str) -> str:
        return value.lower()

    def to_string(self, value: str) -> str:
        return value.upper()


class Whisper(Shout):
    def convert(self, value: str) -> str:
        return f"{value.lower()}?"


def word(request: Any) -> str:
    return str(request.path_params["word"])


def new_kind() -> str:
    return new_name("k").replace("-", "_")


def is_registered(client: serve.Client, kind: str) -> bool:
    return kind in client.sender.desired.convertors


def pass_the_proxies(client: serve.Client, backend: str) -> None:
    """Returns when all proxies follow what was committed until now, and somewhat later."""
    for _ in range(2):
        name = new_name("e")
        client.create_endpoint(name, backend=backend)
        client.delete_endpoint(name)


def late_in_replicas(gate: Gate, kind: type[Shout]) -> type[Shout]:
    """A convertor that replicas have made only when the gate is opened. In the embedded form they share the process with the proxies."""

    class Late(kind):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            if "replica" in sys.argv:
                gate.pass_through()

    return Late


@distributed_only
def test_who_registers_a_convertor_waits_for_a_replica_that_learns_late(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    kind, name, gate, backend = new_kind(), new_name("e"), Gate(tmp_path), deploy(word)
    with ThreadPoolExecutor(1) as elsewhere:
        registering = elsewhere.submit(client.register_convertor, kind, late_in_replicas(gate, Shout))
        wait_until(lambda: gate.came)
        pass_the_proxies(client, backend)
        assert not registering.done()
        gate.open()
        registering.result(60)
    client.create_endpoint(name, backend=backend, route=f"/{name}/{{word:{kind}}}")
    assert httpx.get(f"{client.http_url()}/{name}/ABC").text == "abc"
    client.delete_endpoint(name)


@distributed_only
def test_a_block_opens_a_route_only_when_the_replicas_know_its_convertor(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    kind, name, gate, backend = new_kind(), new_name("e"), Gate(tmp_path), deploy(word)

    def declare() -> None:
        with client.deploying():
            client.register_convertor(kind, late_in_replicas(gate, Shout))
            client.create_endpoint(name, backend=backend, route=f"/{name}/{{word:{kind}}}")

    with ThreadPoolExecutor(1) as elsewhere:
        declaring = elsewhere.submit(declare)
        wait_until(lambda: gate.came)
        pass_the_proxies(client, backend)
        assert httpx.get(f"{client.http_url()}/{name}/ABC").status_code == 404
        gate.open()
        declaring.result(60)
    assert httpx.get(f"{client.http_url()}/{name}/ABC").text == "abc"
    client.delete_endpoint(name)


@distributed_only
def test_a_convertor_that_replaces_another_is_in_effect_when_the_call_returns(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    kind, name, gate, backend = new_kind(), new_name("e"), Gate(tmp_path), deploy(word)
    client.register_convertor(kind, Shout)
    client.create_endpoint(name, backend=backend, route=f"/{name}/{{word:{kind}}}")
    with ThreadPoolExecutor(1) as elsewhere:
        registering = elsewhere.submit(client.register_convertor, kind, late_in_replicas(gate, Whisper))
        wait_until(lambda: gate.came)
        pass_the_proxies(client, backend)
        assert not registering.done()
        gate.open()
        registering.result(60)
    assert httpx.get(f"{client.http_url()}/{name}/ABC").text == "abc?"
    client.delete_endpoint(name)


def test_a_replica_that_is_starting_is_not_waited_for_and_learns_before_its_first_request(
    client: serve.Client, deploy: Deploy, tmp_path: Path
) -> None:
    gate, kind, name = Gate(tmp_path), new_kind(), new_name("b")

    class Slow:
        def __init__(self) -> None:
            gate.pass_through()

        def __call__(self, request: Any) -> str:
            return word(request)

    with ThreadPoolExecutor(2) as elsewhere:
        creating = elsewhere.submit(client.create_backend, name, Slow)
        wait_until(lambda: gate.came)
        client.register_convertor(kind, Shout)
        client.create_endpoint(name, backend=name, route=f"/{name}/{{word:{kind}}}")
        asking = elsewhere.submit(httpx.get, f"{client.http_url()}/{name}/ABC")
        assert not creating.done()
        gate.open()
        creating.result(60)
        assert asking.result().text == "abc"
    client.delete_endpoint(name)
    client.delete_backend(name)


def test_a_convertor_and_then_a_route_serve_a_running_backend_at_once(client: serve.Client, deploy: Deploy) -> None:
    backend = deploy(word, num_replicas=2)
    for _ in range(5):
        kind, name = new_kind(), new_name("e")
        client.register_convertor(kind, Shout)
        client.create_endpoint(name, backend=backend, route=f"/{name}/{{word:{kind}}}")
        assert [httpx.get(f"{client.http_url()}/{name}/ABC").text for _ in range(4)] == ["abc"] * 4
        client.delete_endpoint(name)


class NotInReplicas(Shout):
    """Like one whose module the machines with proxies have, and those with replicas do not."""

    def __init__(self) -> None:
        if "replica" in sys.argv:
            raise LookupError("no such dictionary")


@distributed_only
def test_a_convertor_that_a_replica_cannot_make_is_undone_and_the_call_says_why(client: serve.Client, deploy: Deploy) -> None:
    kind = new_kind()
    backend = deploy(word)
    with pytest.raises(serve.BackendFailed, match=rf"replica {backend}\S* cannot follow the change, which is undone: .*no such dictionary"):
        client.register_convertor(kind, NotInReplicas)
    assert not is_registered(client, kind)
    with (
        pytest.raises(serve.BackendFailed, match=rf"replica {backend}\S* cannot follow the change: .*no such dictionary"),
        client.deploying(),
    ):
        client.register_convertor(kind, NotInReplicas)
    assert not is_registered(client, kind)
    client.register_convertor(kind, Shout)
    name = new_name("e")
    client.create_endpoint(name, backend=backend, route=f"/{name}/{{word:{kind}}}")
    assert httpx.get(f"{client.http_url()}/{name}/ABC").text == "abc"
    client.delete_endpoint(name)


NOW_MS = 1_000_000
VERSION = (1, 7)


def seen(*beats: ProxyBeat | ReplicaBeat) -> Seen:
    return Seen(Observed(), {beat.field: beat for beat in beats}, NOW_MS)


@pytest.mark.parametrize(
    ("beat", "is_awaited"),
    [
        (ReplicaBeat("r", NOW_MS, convertors=(1, 6)), True),
        (ReplicaBeat("r", NOW_MS, convertors=(0, 0), state=MemberState.STARTING), True),
        (ReplicaBeat("r", NOW_MS, convertors=(1, 7)), False),
        (ReplicaBeat("r", NOW_MS, convertors=(2, 1)), False),
        (ReplicaBeat("of-an-earlier-version", NOW_MS), False),
        (ReplicaBeat("r", NOW_MS, convertors=(1, 6), state=MemberState.DRAINING), False),
        (ReplicaBeat("r", NOW_MS, convertors=(1, 6), state=MemberState.FAILED), False),
        (ReplicaBeat("r", NOW_MS - int(SILENT_AFTER_S * 1000), convertors=(1, 6)), False),
    ],
)
def test_replicas_that_follow_and_are_behind_are_waited_for(beat: ReplicaBeat, is_awaited: bool) -> None:
    clauses = seen(beat).behind(VERSION, of_convertors=True)
    assert clauses == (["replica r has not learned its convertors"] if is_awaited else [])
    assert not seen(beat).behind(VERSION, of_convertors=False)


def test_a_replica_refuses_only_versions_that_it_has_tried() -> None:
    assert seen(ReplicaBeat("r", NOW_MS, convertors=(1, 6), convertor_error="no")).refusal(VERSION, of_convertors=True) is None
    assert seen(ReplicaBeat("r", NOW_MS, convertors=(1, 7), convertor_error="no")).refusal(VERSION, of_convertors=True) is not None
    assert seen(ReplicaBeat("r", NOW_MS, convertors=(1, 7), convertor_error="no")).refusal(VERSION, of_convertors=False) is None
