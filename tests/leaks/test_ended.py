"""What has ended leaves nothing in its process, nor on the disk: no thread, descriptor or event loop, no folder, and no client
that is still to be shut down at exit."""

import gc
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import uvloop

import mqserve as serve
from mqserve.controller.node_metrics import serve_metrics
from tests.instances import Deploy, started, wait_until


class Counts(NamedTuple):
    threads: int
    descriptors: int
    clients: int  # one that is to be shut down at exit is kept until then
    loops: int

    @classmethod
    def now(cls) -> "Counts":
        gc.collect()
        clients, loops = (sum(isinstance(kept, kind) for kept in gc.get_objects()) for kind in (serve.Client, uvloop.Loop))
        return cls(threading.active_count(), len(os.listdir("/proc/self/fd")), clients, loops)


@pytest.fixture(autouse=True)
def unheard() -> Iterator[None]:
    """pytest keeps what is logged, and with it the connections that it is about."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def leaves_nothing(go_through: Callable[[], None]) -> None:
    go_through()  # what is made once in a process
    before = Counts.now()
    for _ in range(3):
        go_through()

    def is_no_more() -> bool:  # less, where something of an earlier test has ended meanwhile
        return all(now <= then for now, then in zip(Counts.now(), before, strict=True))

    wait_until(is_no_more, told=lambda: f"{Counts.now()}, and before {before}")


def test_an_embedded_instance_that_has_ended_leaves_nothing_in_its_process() -> None:
    def go_through() -> None:
        with started() as client:
            deploy = Deploy(client)
            assert httpx.get(deploy.at(lambda request: "hello", num_replicas=2, sync_threads=3)).text == "hello"
            assert client.get_handle(deploy(lambda request: "hello")).remote().result(30) == "hello"

    leaves_nothing(go_through)


def test_a_distributed_instance_that_has_ended_leaves_nothing_in_its_process(broker_url: str, store_url: str) -> None:
    def go_through() -> None:
        with started(broker_url=broker_url, store_url=store_url, location=None) as client:
            assert client.list_backends() == {}

    leaves_nothing(go_through)


def test_a_start_that_fails_leaves_nothing_either() -> None:
    def go_through() -> None:
        with pytest.raises(serve.InstanceError, match="No module named 'no'"), started(middlewares=["no.such:Middleware"]):
            pass

    leaves_nothing(go_through)


# What a killed node leaves.

KEEPS_METRICS = """
import subprocess, time
from mqserve.controller.node_metrics import serve_metrics
with serve_metrics("127.0.0.1", 0) as metrics:
    replica = subprocess.Popen(["sleep", "1000"], pass_fds=[metrics.lock], start_new_session=True)
    print(metrics.folder, replica.pid, flush=True)
    time.sleep(1000)
"""


def test_the_metrics_of_a_killed_node_go_with_the_next_one_once_its_replicas_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "mqserve-metrics-of-somebody-else").mkdir()  # without a lock: nobody knows whose it is

    def folders_beside_a_new_node() -> int:
        with serve_metrics("127.0.0.1", 0):
            return len(list(tmp_path.iterdir())) - 2

    node = subprocess.Popen([sys.executable, "-c", KEEPS_METRICS], env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE)
    with node:
        assert node.stdout is not None
        folder, replica = node.stdout.readline().split()
        assert folders_beside_a_new_node() == 1, "its node lives"
        node.kill()
        node.wait()
        assert folders_beside_a_new_node() == 1, "its replica drains, and still writes there"
        os.kill(int(replica), 9)
        wait_until(lambda: folders_beside_a_new_node() == 0)
        assert not Path(folder.decode()).exists()
