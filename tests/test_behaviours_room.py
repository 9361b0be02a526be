"""Nodes with little room, or with more than others: roll-outs that find none, and what an operator is told. Distributed."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mqserve as serve
from tests.instances import CommandLine, new_name, started, wait_until
from tests.shares import show_environment, shown
from tests.test_behaviours_rollout import Asking, says


@pytest.fixture
def small(distributed_shell: CommandLine, broker_url: str, store_url: str, namespace: str) -> Iterator[serve.Client]:
    """An instance whose one node has two CPUs to give."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MQSERVE_NUM_CPUS", "2")
        with started(broker_url=broker_url, store_url=store_url, namespace=namespace) as client:
            yield client


def test_without_room_for_a_surge_one_old_replica_drains_first(small: serve.Client, tmp_path: Path) -> None:
    name = new_name("b")
    small.create_backend(name, says("old"), actor_options={"num_cpus": 1}, config={"num_replicas": 2})
    small.create_endpoint(name, backend=name)
    asking = Asking(small, name)
    small.update_backend(name, says("new"))
    assert set(serve.get([small.get_handle(name).remote() for _ in range(10)], timeout=30)) == {"new"}
    assert set(asking.stop()) <= {"old", "new"}


def test_without_room_a_single_replica_stays_and_the_reason_is_said(small: serve.Client, distributed_shell: CommandLine) -> None:
    name = new_name("b")
    small.create_backend(name, says("old"), actor_options={"num_cpus": 2})
    small.create_endpoint(name, backend=name)
    with pytest.raises(serve.BackendFailed, match="Cannot scale backend"):
        small.update_backend(name, says("new"))
    assert small.get_handle(name).remote().result(30) == "old"
    status = distributed_shell.run("status")
    assert "the last roll-out was undone" in status.stdout and "Cannot scale backend" in status.stdout, status.stdout


def test_status_says_why_a_version_failed(small: serve.Client, distributed_shell: CommandLine) -> None:
    class Broken:
        def __init__(self) -> None:
            raise LookupError("no model file")

        def __call__(self, request: Any) -> None:
            return None

    small.create_backend("b", says("old"))
    with pytest.raises(serve.BackendFailed, match="no model file"):
        small.update_backend("b", Broken)
    status = distributed_shell.run("status")
    assert status.returncode == 0 and "no model file" in status.stdout, status.stdout


def test_a_thread_limit_that_the_operator_set_stays(broker_url: str, store_url: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "12")
        with started(broker_url=broker_url, store_url=store_url) as client:
            client.create_backend("b", show_environment, actor_options={"num_cpus": 1})
            (found,) = shown(client, "b", 1).values()
            assert found["OMP_NUM_THREADS"] == "12"


def test_a_replica_goes_where_its_whole_demand_fits_and_is_never_split(
    distributed_shell: CommandLine, broker_url: str, store_url: str, namespace: str, tmp_path: Path
) -> None:
    def where(request: Any) -> int:
        return os.getppid()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MQSERVE_NUM_CPUS", "2")
        with started(broker_url=broker_url, store_url=store_url, namespace=namespace) as client:
            with pytest.raises(serve.MQServeError, match="Cannot scale backend"):
                client.create_backend("b", where, actor_options={"num_cpus": 3})
            small = distributed_shell.start("node", "--node-id", "small", "--num-cpus", "2", "--no-proxy")
            wait_until(lambda: "small" in distributed_shell.run("status").stdout)
            with pytest.raises(serve.MQServeError, match="Cannot scale backend"):
                client.create_backend("b", where, actor_options={"num_cpus": 3})
            large = distributed_shell.start("node", "--node-id", "large", "--num-cpus", "7", "--resources", '{"tpu": 1}', "--no-proxy")
            wait_until(lambda: "large" in distributed_shell.run("status").stdout)
            client.create_backend("b", where, actor_options={"num_cpus": 3}, config={"num_replicas": 2})
            client.create_endpoint("b", backend="b")
            nodes = Counter(serve.get([client.get_handle("b").remote() for _ in range(10)], timeout=30))
            assert set(nodes) == {large.pid} and small.pid not in nodes
