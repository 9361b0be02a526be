"""What a replica asks for and what a node has: refused where it cannot be had, set where it can."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mqserve as serve
from tests.instances import CommandLine, new_name, started, wait_until


def show_environment(request: Any) -> dict[str, str | None]:
    import time

    time.sleep(0.01)  # for siblings to get some of the requests
    variables = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return {**{name: os.environ.get(name) for name in variables}, "replica": serve.get_current_replica_tag()}


def shown(client: serve.Client, name: str, replicas: int) -> dict[str, dict[str, str | None]]:
    """What each of the replicas shows, by its tag."""
    found: dict[str, dict[str, str | None]] = {}
    if name not in client.list_endpoints():
        client.create_endpoint(name, backend=name)
    handle = client.get_handle(name)

    def all_of_them() -> bool:
        for answer in serve.get([handle.remote() for _ in range(8 * replicas)], timeout=30):
            found[answer["replica"]] = answer
        return len(found) >= replicas

    wait_until(all_of_them)
    assert len(found) == replicas
    return found


# Refusals, in both forms.


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ([], TypeError, "dict"),
        ("num_cpus", TypeError, "dict"),
        ({"lifetime": "detached"}, ValueError, "lifetime"),
        ({"name": "mine"}, ValueError, "name"),
        ({"max_restarts": 3}, ValueError, "max_restarts"),
        ({"placement_group": None}, ValueError, "placement_group"),
        ({"num_cpu": 1}, ValueError, "num_cpu"),
        ({"num_cpus": "1"}, TypeError, "num_cpus"),
        ({"num_cpus": True}, TypeError, "num_cpus"),
        ({"num_cpus": -1}, ValueError, "num_cpus"),
        ({"num_gpus": "1"}, TypeError, "num_gpus"),
        ({"num_gpus": -0.5}, ValueError, "num_gpus"),
        ({"num_gpus": 1.5}, ValueError, "whole"),
        ({"memory": "1G"}, TypeError, "memory"),
        ({"memory": -1}, ValueError, "memory"),
        ({"resources": ["tpu"]}, TypeError, "resources"),
        ({"resources": {"tpu": "1"}}, TypeError, "tpu"),
        ({"resources": {"tpu": -1}}, ValueError, "tpu"),
        ({"pip": "six"}, TypeError, "pip"),
        ({"python": 3}, TypeError, "python"),
    ],
    ids=str,
)
def test_actor_options_that_make_no_sense_are_refused(client: serve.Client, options: Any, error: type[Exception], words: str) -> None:
    name = new_name("b")
    for keyword in ("actor_options", "ray_actor_options"):
        with pytest.raises(error, match=words):
            client.create_backend(name, show_environment, **{keyword: options})
    assert name not in client.list_backends()


@pytest.mark.parametrize("options", [{"num_cpus": 10_000}, {"resources": {"unobtainium": 1}}, {"memory": 10**18}], ids=str)
def test_what_no_node_has_is_said_at_create_and_nothing_stays_registered(client: serve.Client, options: dict[str, Any]) -> None:
    name = new_name("b")
    with pytest.raises(serve.MQServeError, match=f"Cannot scale backend '{name}'"):
        client.create_backend(name, show_environment, actor_options=options)
    assert name not in client.list_backends()
    client.create_backend(name, show_environment)
    client.delete_backend(name)


def test_too_many_replicas_for_the_cpus_are_said_at_create_and_at_scaling(client: serve.Client) -> None:
    name = new_name("b")
    share = {"num_cpus": (os.cpu_count() or 1) / 2}
    with pytest.raises(serve.MQServeError, match="Cannot scale backend"):
        client.create_backend(name, show_environment, actor_options=share, config={"num_replicas": 3})
    assert name not in client.list_backends()
    client.create_backend(name, show_environment, actor_options=share, config={"num_replicas": 2})
    with pytest.raises(serve.MQServeError, match="Cannot scale backend"):
        client.update_backend_config(name, {"num_replicas": 3})
    assert len(shown(client, name, 2)) == 2
    client.delete_endpoint(name)
    client.delete_backend(name)


def test_a_deleted_backend_gives_its_share_back(client: serve.Client) -> None:
    whole = {"num_cpus": os.cpu_count() or 1}
    for _ in range(2):
        client.create_backend(name := new_name("b"), show_environment, actor_options=whole)
        client.delete_backend(name)


@pytest.mark.parametrize(
    "options", [{"num_gpus": 0.5}, {"python": "/usr/bin/python3"}, {"pip": ["six"]}], ids=["num_gpus", "python", "pip"]
)
def test_the_embedded_form_refuses_by_name_what_one_process_cannot_give(options: dict[str, Any]) -> None:
    with started() as client:
        with pytest.raises(ValueError, match=f"{next(iter(options))} cannot be had in the embedded form"):
            client.create_backend("b", show_environment, actor_options=options)
        assert client.list_backends() == {}


# Shares: distributed, on a node that says what it has.


@pytest.fixture(scope="module")
def rich(broker_url: str, store_url: str) -> Iterator[serve.Client]:
    """An instance whose node offers four CPUs, two GPUs and three of something of the operator's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MQSERVE_NUM_CPUS", "4")
        patch.setenv("MQSERVE_NUM_GPUS", "2")
        patch.setenv("MQSERVE_RESOURCES", '{"tpu": 3}')
        patch.delenv("OMP_NUM_THREADS", raising=False)
        with started(broker_url=broker_url, store_url=store_url) as client:
            yield client


@pytest.fixture
def created(rich: serve.Client) -> Iterator[Any]:
    names: list[str] = []

    def create(replicas: int = 1, **options: Any) -> str:
        name = new_name("b")
        rich.create_backend(name, show_environment, actor_options=options, config={"num_replicas": replicas})
        names.append(name)
        return name

    yield create
    for name in names:
        rich.delete_endpoint(name)
        rich.delete_backend(name)


def test_two_halves_share_one_gpu_and_a_third_gets_the_other(rich: serve.Client, created: Any) -> None:
    halves = [created(num_gpus=0.5), created(num_gpus=0.5)]
    third = created(num_gpus=0.75)
    devices = [one["CUDA_VISIBLE_DEVICES"] for name in [*halves, third] for one in shown(rich, name, 1).values()]
    assert devices[0] == devices[1] and {devices[0], devices[2]} == {"0", "1"}


def test_each_of_two_replicas_has_a_gpu_of_its_own(rich: serve.Client, created: Any) -> None:
    found = shown(rich, created(2, num_gpus=1), 2)
    assert sorted(str(one["CUDA_VISIBLE_DEVICES"]) for one in found.values()) == ["0", "1"]
    with pytest.raises(serve.MQServeError, match="Cannot scale backend"):
        created(num_gpus=0.1)


def test_a_replica_of_two_gpus_sees_both(rich: serve.Client, created: Any) -> None:
    (found,) = shown(rich, created(num_gpus=2), 1).values()
    assert found["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize(("num_cpus", "threads"), [(0, "1"), (0.5, "1"), (1, "1"), (2.5, "2"), (4, "4")])
def test_the_thread_limit_follows_the_cpus(rich: serve.Client, created: Any, num_cpus: float, threads: str) -> None:
    (found,) = shown(rich, created(num_cpus=num_cpus), 1).values()
    assert found["OMP_NUM_THREADS"] == threads and found["CUDA_VISIBLE_DEVICES"] == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_an_operators_own_resource_is_counted(rich: serve.Client, created: Any) -> None:
    assert len(shown(rich, created(2, resources={"tpu": 1.5}), 2)) == 2
    with pytest.raises(serve.MQServeError, match=r"tpu 0\.1"):
        created(resources={"tpu": 0.1})


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
