"""A whole instance for tests that kill any part of it: the soak's cluster, whose servers keep their data, driven by plain code."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import mqserve as serve
from tests.faults.members import Members
from tests.faults.soak.cluster import Cluster, Member
from tests.instances import SECRET_KEY, answers, new_namespace, wait_until
from tests.servers import PrivateServer


class Site:
    """Two controllers, two nodes, two proxies, and a client in this process."""

    def __init__(self, cluster: Cluster, members: Members, client: serve.Client) -> None:
        self.cluster = cluster
        self.members = members
        self.client = client

    def __repr__(self) -> str:
        return f"<Site {self.cluster.namespace}, {len(self.members.last_beats())} members>"

    @property
    def urls(self) -> list[str]:
        """Where the proxies listen."""
        return list(self.cluster.urls.values())

    def kill_proxy(self, number: int) -> None:
        self._kill(self.cluster.proxies[number])
        wait_until(lambda: answers(f"{self.urls[number]}/-/readyz"))

    def kill_leader(self) -> None:
        """The controller that leads; returns when the other one does."""
        pid = wait_until(lambda: self.members.leader()[0])
        (member,) = [member for member in self.cluster.controllers if member.program.pid == pid]
        self._kill(member)
        wait_until(lambda: self.members.leader()[0] not in (0, pid))

    def _kill(self, member: Member) -> None:
        """As a crash would, and starts it again as whoever runs it would."""
        member.program.kill()
        self.cluster.start_member(member)

    def kill_server(self, server: PrivateServer) -> None:
        """As a crash would; returns when it is back, with its data, and the proxies take requests again."""
        server.restart(kindly=False)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        wait_until(lambda: all(answers(f"{url}/-/readyz") for url in self.urls))

    def logs(self) -> str:
        return "\n".join(f"--- {name}\n{text[-3000:]}" for name, text in self.cluster.logs())


@contextmanager
def running_site(folder: Path, name: str) -> Iterator[Site]:
    cluster = Cluster(folder, new_namespace(name))
    with asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MQSERVE_SECRET_KEY", SECRET_KEY)
        try:
            runner.run(cluster.start())
            members = Members(cluster.store.url, cluster.namespace)
            client = serve.connect(broker_url=cluster.broker.url, store_url=cluster.store.url, namespace=cluster.namespace)
            yield Site(cluster, members, client)
            client.shutdown()
            members.close()
        finally:
            runner.run(cluster.close())
