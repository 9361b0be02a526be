"""Deleting a busy backend, gently and by force; ending instances; two of them side by side. In both forms."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import SECRET_KEY, CommandLine, Deploy, new_name, wait_until

SCRIPT = """
import mqserve as serve
client = serve.start(http_options={"port": 0})
client.create_backend("b", lambda request: "%s")
client.create_endpoint("e", backend="b", route="/e")
import httpx
print(httpx.get(client.http_url() + "/e").text, flush=True)
try:
    serve.start(http_options={"port": 0})
except serve.MQServeError as error:
    print("a second start:", error)
client.shutdown()
client.shutdown()
deploy = lambda: client.create_backend("c", lambda request: 1)
for call in (client.list_backends, client.list_endpoints, deploy, lambda: client.get_handle("e")):
    try:
        call()
    except serve.MQServeError as error:
        print(error)
serve.shutdown()
"""


def busy(client: serve.Client, gate: Gate, count: int, **config: Any) -> tuple[str, list[serve.Future]]:
    """A backend with so many accepted requests, of which the first waits at the gate."""

    def wait(request: Any) -> Any:
        gate.pass_through()
        return request.data

    name = new_name("b")
    client.create_backend(name, wait, config=config)
    client.create_endpoint(name, backend=name)
    handle = client.get_handle(name)
    refs = [handle.remote(number) for number in range(count)]
    wait_until(lambda: gate.came == 1)
    client.delete_endpoint(name)
    return name, refs


def test_deleting_a_busy_backend_waits_for_all_it_accepted(client: serve.Client, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    name, refs = busy(client, gate, 10)
    with ThreadPoolExecutor(1) as background:
        deleting = background.submit(client.delete_backend, name)
        with pytest.raises(TimeoutError):
            deleting.result(1.5)
        gate.open()
        assert serve.get(refs, timeout=60) == list(range(10))
        deleting.result(60)
    assert name not in client.list_backends()


def test_deleting_by_force_waits_for_nothing(client: serve.Client, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    name, refs = busy(client, gate, 10, request_timeout_s=5)
    with ThreadPoolExecutor(1) as background:
        background.submit(client.delete_backend, name, force=True).result(60)
    assert name not in client.list_backends()
    for ref in refs:
        with pytest.raises(serve.BackendGone):
            ref.result(30)
    client.create_backend(name, lambda request: "again")
    client.delete_backend(name)
    gate.open()


def test_an_instance_ends_once_and_says_so_ever_after(form: str, request: pytest.FixtureRequest, shell: CommandLine) -> None:
    if form == "distributed":
        shell = request.getfixturevalue("distributed_shell")
    told = shell.with_variables(MQSERVE_SECRET_KEY=SECRET_KEY).python(SCRIPT % "hello")
    lines = told.stdout.splitlines()
    assert told.returncode == 0, told.stderr
    assert lines[0] == "hello" and lines[1].startswith("a second start: ")
    assert lines[2:] == ["Client has already been shut down."] * 4


def test_two_instances_of_equal_names_do_not_interfere(
    client: serve.Client, deploy: Deploy, shell: CommandLine, form: str, request: Any
) -> None:
    if form == "distributed":
        shell = request.getfixturevalue("distributed_shell")
    client.create_backend("b", lambda request: "mine")
    client.create_endpoint("e", backend="b", route="/e")
    told = shell.with_variables(MQSERVE_SECRET_KEY=SECRET_KEY).python(SCRIPT % "theirs")
    assert told.stdout.splitlines()[0] == "theirs", told.stderr
    assert httpx.get(f"{client.http_url()}/e").text == "mine"
    client.delete_endpoint("e")
    client.delete_backend("b")


WAITING = """
import logging
import time
import mqserve as serve

def slowly(request):
    time.sleep(0.2)
    return request.data

client = serve.start(http_options={"location": None})
client.create_backend("b", slowly)
client.create_endpoint("e", backend="b")
refs = [client.get_handle("e").remote(number) for number in range(10)]
client.shutdown()
print(serve.get(refs, timeout=0))
"""


def test_what_waits_in_a_queue_at_the_end_of_an_instance_is_run_first(
    form: str, request: pytest.FixtureRequest, shell: CommandLine
) -> None:
    if form == "distributed":
        shell = request.getfixturevalue("distributed_shell")
    told = shell.with_variables(MQSERVE_SECRET_KEY=SECRET_KEY).python(WAITING)
    assert told.stdout == f"{list(range(10))}\n", told.stderr


def test_an_instance_ends_in_time_though_its_queues_are_not_empty(form: str, request: pytest.FixtureRequest, shell: CommandLine) -> None:
    if form == "distributed":
        shell = request.getfixturevalue("distributed_shell")
    script = WAITING.replace('"b", slowly', '"b", slowly, config={"graceful_shutdown_timeout_s": 0.5}').replace("0.2", "2")
    told = shell.with_variables(MQSERVE_SECRET_KEY=SECRET_KEY).python(script)
    assert "BackendGone" in told.stderr
