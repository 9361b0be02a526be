"""What replicas get of a node that says what it has: GPUs and parts of them, thread limits, the operator's own resources. Distributed."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

import mqserve as serve
from tests.instances import new_name, started
from tests.shares import show_environment, shown


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
