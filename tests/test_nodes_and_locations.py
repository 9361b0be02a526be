"""Where proxies and replicas run, as nodes come and go: a distributed instance of several processes, all from the command line."""

import os
import signal
import sys
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.faults.members import Members
from tests.instances import CommandLine, answers, is_alive, wait_until
from tests.ports import free_port

APP = """
import os
import mqserve as serve

@serve.endpoint("/pid")
def pid(request):
    return os.getpid()
"""


@pytest.fixture
def app(distributed_shell: CommandLine) -> str:
    return distributed_shell.file("app.py", APP)


@pytest.fixture
def ports() -> tuple[int, int]:
    """Of the first node's proxy and the second's."""
    return free_port(), free_port()


@pytest.fixture
def healthy(ports: tuple[int, int]) -> Iterator[dict[str, str]]:
    yield {name: f"http://127.0.0.1:{port}/-/healthz" for name, port in zip(("first", "second"), ports, strict=True)}


def start(shell: CommandLine, app: str, port: int, location: str) -> None:
    shell.start("run", app, "--port", str(port), "--location", location).wait_for("Ctrl-C stops")


def node_is_there(shell: CommandLine, name: str) -> bool:
    return any(line.startswith("node") and f" {name} " in line and "ready" in line for line in shell.run("status").stdout.splitlines())


def proxies_of(shell: CommandLine) -> list[str]:
    return [line for line in shell.run("status").stdout.splitlines() if line.startswith("proxy") and "ready" in line]


@pytest.mark.long
def test_head_only_gives_one_proxy_however_many_nodes(
    distributed_shell: CommandLine, app: str, ports: tuple[int, int], healthy: dict[str, str]
) -> None:
    start(distributed_shell, app, ports[0], "HeadOnly")
    distributed_shell.start("node", "--node-id", "second", "--http-port", str(ports[1]))
    wait_until(lambda: node_is_there(distributed_shell, "second"))
    assert answers(healthy["first"]) and not answers(healthy["second"])
    assert len(proxies_of(distributed_shell)) == 1


def test_every_node_gives_each_node_a_proxy_as_nodes_come_and_go(
    distributed_shell: CommandLine, app: str, ports: tuple[int, int], healthy: dict[str, str]
) -> None:
    start(distributed_shell, app, ports[0], "EveryNode")
    second = distributed_shell.start("node", "--node-id", "second", "--http-port", str(ports[1]))
    wait_until(lambda: answers(healthy["second"]))
    assert answers(healthy["first"]) and len(proxies_of(distributed_shell)) == 2
    assert httpx.get(f"http://127.0.0.1:{ports[1]}/pid", timeout=30).status_code == 200

    second.signal(signal.SIGTERM)
    assert second.wait() == 0
    assert not answers(healthy["second"]) and answers(healthy["first"])

    distributed_shell.start("node", "--node-id", "third", "--http-port", str(ports[1]))
    wait_until(lambda: answers(healthy["second"]))


@pytest.mark.long
def test_a_killed_node_takes_its_proxy_with_it(
    distributed_shell: CommandLine, app: str, ports: tuple[int, int], healthy: dict[str, str]
) -> None:
    start(distributed_shell, app, ports[0], "EveryNode")
    second = distributed_shell.start("node", "--node-id", "second", "--http-port", str(ports[1]))
    wait_until(lambda: answers(healthy["second"]))
    children = second.descendants()
    second.signal(signal.SIGKILL)
    wait_until(lambda: not any(is_alive(child) for child in children), deadline_s=25, told=lambda: children)  # their last resort is 9 s
    assert not answers(healthy["second"]) and answers(healthy["first"])


@pytest.mark.long
def test_no_server_gives_no_proxy_and_an_external_one_serves_uncounted(
    distributed_shell: CommandLine, app: str, ports: tuple[int, int], healthy: dict[str, str]
) -> None:
    start(distributed_shell, app, ports[0], "NoServer")
    assert not answers(healthy["first"]) and not proxies_of(distributed_shell)
    external = distributed_shell.start("proxy", "--port", str(ports[1]))
    wait_until(lambda: answers(healthy["second"]))
    assert httpx.get(f"http://127.0.0.1:{ports[1]}/pid", timeout=30).status_code == 200
    (shown,) = wait_until(lambda: proxies_of(distributed_shell))
    assert "(external)" in shown and str(ports[1]) in shown
    external.signal(signal.SIGTERM)
    assert external.wait() == 0
    wait_until(lambda: not proxies_of(distributed_shell))


@pytest.mark.long
def test_an_external_replica_serves_and_is_not_counted(distributed_shell: CommandLine, app: str, ports: tuple[int, int]) -> None:
    start(distributed_shell, app, ports[0], "HeadOnly")
    external = distributed_shell.start("replica", "pid")
    url = f"http://127.0.0.1:{ports[0]}/pid"
    wait_until(lambda: answer_of(url) == external.pid)
    wait_until(lambda: answer_of(url) != external.pid)  # the counted one is there still
    replicas = [line for line in distributed_shell.run("status").stdout.splitlines() if line.startswith("replica")]
    assert len(replicas) == 2 and sum("(external)" in line for line in replicas) == 1
    external.signal(signal.SIGTERM)
    assert external.wait() == 0
    assert answer_of(url) != external.pid


def answer_of(url: str) -> int:
    """The process that served it; a refusal is none."""
    return int(httpx.get(url, timeout=30).raise_for_status().json())


def test_a_killed_proxy_comes_back(distributed_shell: CommandLine, app: str, ports: tuple[int, int], healthy: dict[str, str]) -> None:
    start(distributed_shell, app, ports[0], "HeadOnly")
    (proxy,) = [process for process in psutil.process_iter(["cmdline"]) if is_proxy_on(process, ports[0])]
    os.kill(proxy.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(proxy))
    wait_until(lambda: answers(healthy["first"]))


def is_proxy_on(process: psutil.Process, port: int) -> bool:
    command = process.info["cmdline"] or []
    return "proxy" in command and str(port) in command


CREATE = "import mqserve as serve; client = serve.connect(); client.create_backend('b', 'math:sqrt'); print(client.list_backends())"


@pytest.fixture
def members(store_url: str, namespace: str) -> Iterator[Members]:
    members = Members(store_url, namespace)
    yield members
    members.close()


def test_a_backend_waits_for_a_node_that_is_starting(distributed_shell: CommandLine, members: Members) -> None:
    distributed_shell.start("controller")
    wait_until(lambda: members.leader()[0])
    creating = distributed_shell.start_program([sys.executable, "-c", CREATE])
    wait_until(lambda: "b" in members.compared().backends or creating.ended, told=lambda: creating.output)
    distributed_shell.start("node")
    assert creating.wait() == 0 and "'b'" in creating.output, creating.output


@pytest.mark.long
def test_a_backend_that_no_node_comes_to_run_is_given_up_with_the_reason(distributed_shell: CommandLine) -> None:
    distributed_shell.start("controller")
    wait_until(lambda: distributed_shell.run("status").returncode == 0)
    refused = distributed_shell.python(CREATE)
    assert refused.returncode == 1 and "there is no node to run it: start one with `mqserve node`" in refused.stderr
    assert "'b'" not in distributed_shell.run("status").stdout
