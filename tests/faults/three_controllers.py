"""Three controllers and what they look after, each a process of its own, for the tests that kill them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import mqserve as serve
from tests.faults.members import Members
from tests.instances import SECRET_KEY, CommandLine, Program, answers, wait_until
from tests.ports import free_port

CHANGE_OF_LEADERS_S = 10 + 15  # what is promised, and what a busy machine may add
LEADS_OR_WAITS = "mqserve.controller.loop: "  # the first that a controller says: that it leads, or that another one does


class Cluster:
    """Three controllers, two nodes, an external proxy and a client, each but the client a process of its own."""

    def __init__(self, shell: CommandLine, members: Members) -> None:
        self.members = members
        self._shell = shell
        self._controllers: dict[int, Program] = {}
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.complete()
        for number in (1, 2):
            shell.start("node", "--node-id", f"n{number}")
        shell.start("proxy", "--port", str(port))
        wait_until(lambda: answers(f"{self.url}/-/healthz") and len(members.beats("node")) == 2)
        self.client = serve.connect(
            broker_url=shell.env["MQSERVE_BROKER_URL"],
            store_url=shell.env["MQSERVE_STORE_URL"],
            namespace=shell.env["MQSERVE_NAMESPACE"],
        )

    def complete(self) -> None:
        """Starts as many controllers as have ended, the first one alone, so that there is an instance to join. Returns once they have
        joined, since one that comes after the end of the instance starts another."""
        started: list[Program] = []
        while len(running := [controller for controller in self._controllers.values() if not controller.ended]) < 3:
            controller = self._shell.start("--verbose", "controller")
            self._controllers[controller.pid] = controller
            started.append(controller)
            if not running:
                controller.wait_for(LEADS_OR_WAITS)
        for controller in started:
            controller.wait_for(LEADS_OR_WAITS)

    @property
    def controllers(self) -> list[Program]:
        return [controller for controller in self._controllers.values() if not controller.ended]

    def close(self) -> None:
        for controller in self._controllers.values():
            if not controller.ended:
                controller.signal(signal.SIGCONT)
        self.client.shutdown()
        assert {controller.wait() for controller in self._controllers.values()} <= {0, -signal.SIGKILL}, "they end with the instance"

    def leader(self) -> Program:
        return self._controllers[wait_until(lambda: self.members.leader()[0])]

    def wait_for_another(self, old: Program, deadline_s: float) -> Program:
        def another() -> Program | None:
            pid, _ = self.members.leader()
            return self._controllers[pid] if pid not in (0, old.pid) else None

        return wait_until(another, deadline_s)  # type: ignore[return-value]


@contextmanager
def running_cluster(folder: Path, broker_url: str, store_url: str, namespace: str, **environment: str) -> Iterator[Cluster]:
    shell = CommandLine.joining(folder, broker_url, store_url, namespace, **environment)
    members = Members(store_url, namespace)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MQSERVE_SECRET_KEY", SECRET_KEY)
            cluster = Cluster(shell, members)
        yield cluster
        cluster.close()
    finally:
        shell.close()
        members.close()
