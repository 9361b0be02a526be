"""What is deleted leaves nothing that counts, in either form: no series of its routes and replicas, no class of its code."""

import gc
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

import mqserve as serve
from mqserve.controller.state.beats import NodeBeat, read_beats
from tests.gates import Gate
from tests.instances import Deploy, distributed_only, new_name, wait_until

Series = set[tuple[str, frozenset[tuple[str, str]]]]


def series(client: serve.Client) -> Series:
    """All of ours on the proxy's page, with their labels."""
    return series_of(f"{client.http_url()}/-/metrics")


def page_of_the_node(client: serve.Client) -> str:
    connections = client._connections
    beats = read_beats(client._call(connections.store.fields(connections.keys.beats)))
    return next(beat.url for beat in beats.values() if isinstance(beat, NodeBeat))


def series_of(url: str) -> Series:
    page = httpx.get(url).raise_for_status().text
    return {
        (sample.name, frozenset(sample.labels.items()))
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name.startswith("mqserve_")
    }


def test_what_was_deleted_has_no_series(client: serve.Client) -> None:
    before, deploy = series(client), Deploy(client)
    url, name = deploy.named(lambda request: "hello")
    shadow = deploy(lambda request: "shadow")
    client.shadow_traffic(name, shadow, 1.0)
    assert [httpx.get(url).text for _ in range(3)] == ["hello"] * 3
    assert client.get_handle(name).remote().result(30) == "hello"
    assert httpx.get(f"{url}/nothing").status_code == 404
    assert len(series(client)) > len(before) + 15
    client.set_traffic(name, {shadow: 1.0})
    assert httpx.get(url).text == "shadow"
    deploy.undo()
    assert series(client) == before


def test_replicas_that_went_have_no_series_and_their_backend_has(deploy: Deploy, form: str) -> None:
    url, name = deploy.named(lambda request: "hello", num_replicas=3)

    def page() -> str:
        return f"{deploy.client.http_url()}/-/metrics" if form == "embedded" else page_of_the_node(deploy.client)

    def replicas() -> set[str]:
        return {value for _, labels in series_of(page()) for label, value in labels if label == "replica" and value.startswith(name)}

    wait_until(lambda: len(replicas()) == 3)
    deploy.client.update_backend_config(name, {"num_replicas": 1})
    wait_until(lambda: len(replicas()) == 1)
    assert httpx.get(url).text == "hello"
    wait_until(lambda: ("mqserve_backend_request_counter_total", frozenset({("backend", name)})) in series_of(page()))


def test_a_request_that_outlives_its_route_is_answered_and_leaves_no_series(client: serve.Client, tmp_path: Path) -> None:
    gate, before, deploy = Gate(tmp_path), series(client), Deploy(client)

    def wait(request: Any) -> str:
        gate.pass_through()
        return "passed"

    url, name = deploy.named(wait)
    with ThreadPoolExecutor(1) as background:
        answer = background.submit(httpx.get, url)
        wait_until(lambda: gate.came == 1)
        client.delete_endpoint(name)
        waiting = ("mqserve_backend_queued_queries", frozenset({("backend", name), ("endpoint", name)}))
        assert waiting in series(client), "it still waits, and that is seen"
        gate.open()
        assert answer.result(30).text == "passed"
    client.delete_backend(name)
    assert series(client) == before


def test_the_class_of_a_backend_goes_with_it(client: serve.Client) -> None:
    def deployed() -> "weakref.ref[type]":
        class Ephemeral:
            def __call__(self, request: Any) -> str:
                return "hello"

        name = new_name("b")
        client.create_backend(name, Ephemeral)
        client.create_endpoint(name, backend=name)
        assert client.get_handle(name).remote().result(30) == "hello"
        client.delete_endpoint(name)
        client.delete_backend(name)
        return weakref.ref(Ephemeral)

    classes = [deployed() for _ in range(3)]

    def all_are_gone() -> bool:
        gc.collect()
        return not any(kept() for kept in classes)

    wait_until(all_are_gone)


@distributed_only
def test_a_replica_holds_the_lock_of_its_nodes_metrics(deploy: Deploy) -> None:
    def held(request: Any) -> bool:
        files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
        of_the_node = os.path.dirname(os.environ["PROMETHEUS_MULTIPROC_DIR"])
        return os.path.join(of_the_node, "lock") in files

    assert deploy.client.get_handle(deploy(held)).remote().result(30) is True
