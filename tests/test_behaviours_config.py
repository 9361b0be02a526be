"""What a backend's user may turn: validated where it is written, changed only where it is set, taken without a new replica."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pydantic
import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, new_name, wait_until


def tag_of_replica(request: Any) -> str:
    time.sleep(0.01)  # for siblings to get some of the requests
    return serve.get_current_replica_tag()


def tags(client: serve.Client, name: str, at_least: int = 1) -> set[str]:
    """Of the replicas that answer 40 requests, and more until there are so many: the first may all be one's."""
    handle, found = client.get_handle(name), set[str]()

    def are_found() -> bool:
        found.update(serve.get([handle.remote() for _ in range(40)], timeout=60))
        return len(found) >= at_least

    wait_until(are_found, told=lambda: found)
    return found


# Validation.

BAD = [
    {"num_replicas": 0},
    {"num_replicas": 10_001},
    {"num_replicas": -1},
    {"num_replicas": "many"},
    {"num_replicas": 1.5},
    {"max_batch_size": 0},
    {"max_batch_size": -1},
    {"max_batch_size": "three"},
    {"batch_wait_timeout": -0.1},
    {"max_concurrent_queries": 0},
    {"max_concurrent_queries": -1},
    {"sync_threads": 0},
    {"request_timeout_s": 0},
    {"request_timeout_s": 25 * 60 + 1},
    {"max_queued_requests": 0},
    {"graceful_shutdown_timeout_s": -1},
    {"start_timeout_s": 0},
    {"delivery": "exactly_once"},
    {"max_attempts": 0},
    {"health_check_period_s": 0},
    {"health_check_timeout_s": 0},
    {"max_surge": 0},
    {"stream_idle_timeout_s": 0},
    {"resume_grace_s": -1},
    {"on_death": "retry"},
    {"on_death": "replay", "delivery": "at_most_once"},
    {"stream_kept_bytes": 0},
    {"stream_kept_frames": 0},
    {"num_replica": 2},
]


@pytest.mark.parametrize("settings", BAD, ids=str)
def test_a_config_refuses_what_makes_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        serve.BackendConfig(**settings)


@pytest.mark.parametrize("settings", BAD[:3] + BAD[-1:], ids=str)
def test_create_and_update_name_the_bad_setting_and_change_nothing(client: serve.Client, deploy: Deploy, settings: dict[str, Any]) -> None:
    (key,) = settings
    name = new_name("b")
    with pytest.raises(ValueError, match=key):
        client.create_backend(name, tag_of_replica, config=settings)
    assert name not in client.list_backends()
    deployed = deploy(tag_of_replica)
    with pytest.raises(ValueError, match=key):
        client.update_backend_config(deployed, settings)
    assert client.get_backend_config(deployed) == serve.BackendConfig()


def test_a_handler_of_batches_cannot_be_replayed(client: serve.Client) -> None:
    @serve.accept_batch
    def handler(requests: list[Any]) -> list[Any]:
        return requests

    with pytest.raises(ValueError, match="on_death"):
        client.create_backend(new_name("b"), handler, config={"on_death": "replay"})


def test_a_number_in_a_string_is_read_as_one() -> None:
    assert serve.BackendConfig(num_replicas="3").num_replicas == 3  # type: ignore[arg-type]


def test_an_assignment_is_validated_and_the_other_fields_stay() -> None:
    config = serve.BackendConfig(max_batch_size=7)
    with pytest.raises(pydantic.ValidationError):
        config.num_replicas = -1
    with pytest.raises(pydantic.ValidationError):
        config.max_batch_size = 0
    config.num_replicas = 2
    assert (config.num_replicas, config.max_batch_size, config.batch_wait_timeout) == (2, 7, 0.0)


def test_a_config_of_another_type_is_a_type_error(client: serve.Client, deploy: Deploy) -> None:
    with pytest.raises(TypeError, match="dict or a BackendConfig"):
        client.create_backend(new_name("b"), tag_of_replica, config=[("num_replicas", 2)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dict or a BackendConfig"):
        client.update_backend_config(deploy(tag_of_replica), 2)  # type: ignore[arg-type]


def test_the_config_of_an_unknown_backend_is_a_value_error(client: serve.Client) -> None:
    with pytest.raises(ValueError, match="nobody"):
        client.get_backend_config("nobody")
    with pytest.raises(ValueError, match="nobody"):
        client.update_backend_config("nobody", {"num_replicas": 2})


# How many requests a replica holds.


@pytest.mark.parametrize(
    ("settings", "is_async", "limit"),
    [
        ({}, False, 64),
        ({"sync_threads": 40}, False, 80),
        ({"max_batch_size": 7}, False, 14),
        ({"max_batch_size": 10, "batch_wait_timeout": 1}, False, 20),
        ({"batch_wait_timeout": 1}, False, 64),
        ({}, True, 100),
        ({"max_batch_size": 10, "batch_wait_timeout": 1}, True, 20),
        ({"max_batch_size": 10}, True, 100),
        ({"max_concurrent_queries": 3, "max_batch_size": 7}, False, 3),
        ({"max_concurrent_queries": 3}, True, 3),
    ],
    ids=str,
)
def test_the_limit_of_concurrent_queries_follows_from_the_rest(settings: dict[str, Any], is_async: bool, limit: int) -> None:
    assert serve.BackendConfig(**settings).concurrency(is_async) == limit


@pytest.mark.parametrize(
    ("settings", "limit"),
    [({"max_concurrent_queries": 3}, 3), ({}, 100)],
    ids=["as-set", "by-default"],
)
def test_an_async_replica_runs_as_many_as_its_limit_whoever_asks(
    client: serve.Client, deploy: Deploy, tmp_path: Path, settings: dict[str, Any], limit: int
) -> None:
    """Over HTTP and by handle together: the limit is the replica's, not each router's."""
    gate = Gate(tmp_path)

    async def wait(request: Any) -> str:
        await gate.pass_through_async()
        return "passed"

    name = new_name("r")
    backend = deploy(wait, route=f"/{name}", **settings)
    handle = client.get_handle(backend)
    with ThreadPoolExecutor(2) as threads:
        by_http = [threads.submit(httpx.get, f"{deploy.url}/{name}", timeout=30) for _ in range(2)]
        by_handle = [handle.remote() for _ in range(limit + 5)]
        wait_until(lambda: gate.came >= limit)
        with pytest.raises(TimeoutError):
            serve.get(by_handle, timeout=0.3)
        assert gate.came == limit
        gate.open()
        assert serve.get(by_handle, timeout=30) == ["passed"] * (limit + 5)
        assert [future.result().text for future in by_http] == ["passed"] * 2


def test_two_replicas_of_limit_one_run_one_each_and_the_third_request_waits(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def wait(request: Any) -> str:
        await gate.pass_through_async(serve.get_current_replica_tag())
        return serve.get_current_replica_tag()

    handle = client.get_handle(deploy(wait, num_replicas=2, max_concurrent_queries=1))
    refs = [handle.remote() for _ in range(3)]
    wait_until(lambda: gate.came == 2)
    assert len(set(gate.names)) == 2
    with pytest.raises(TimeoutError):
        serve.get(refs, timeout=0.3)
    assert gate.came == 2
    gate.open()
    assert set(serve.get(refs, timeout=30)) == set(gate.names)


def test_a_plain_handler_runs_one_at_a_time_and_with_threads_as_many_as_those(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    for threads in (1, 3):
        gate = Gate(tmp_path)

        def wait(request: Any, gate: Gate = gate) -> str:
            gate.pass_through()
            return "passed"

        handle = client.get_handle(deploy(wait, sync_threads=threads))
        refs = [handle.remote() for _ in range(5)]
        wait_until(lambda gate=gate, threads=threads: gate.came == threads)  # type: ignore[misc]
        with pytest.raises(TimeoutError):
            serve.get(refs, timeout=0.2)
        assert gate.came == threads
        gate.open()
        assert serve.get(refs, timeout=30) == ["passed"] * 5


def test_ten_async_calls_that_need_each_other_all_finish_in_one_replica(client: serve.Client, deploy: Deploy) -> None:
    class Meeting:
        def __init__(self) -> None:
            import asyncio

            self.here = 0
            self.all_here = asyncio.Event()

        async def __call__(self, request: Any) -> int:
            self.here += 1
            if self.here == 10:
                self.all_here.set()
            await self.all_here.wait()
            return self.here

    handle = client.get_handle(deploy(Meeting))
    assert serve.get([handle.remote() for _ in range(10)], timeout=30) == [10] * 10


# Updates.


def test_only_what_is_set_changes(client: serve.Client, deploy: Deploy) -> None:
    name = deploy(tag_of_replica, max_concurrent_queries=5, request_timeout_s=30)
    client.update_backend_config(name, {"max_attempts": 2})
    client.update_backend_config(name, serve.BackendConfig(graceful_shutdown_timeout_s=7))
    config = client.get_backend_config(name)
    assert config.model_dump(exclude_unset=True) == {
        "max_concurrent_queries": 5,
        "request_timeout_s": 30.0,
        "max_attempts": 2,
        "graceful_shutdown_timeout_s": 7.0,
    }
    assert client.list_backends()[name] == config


@pytest.mark.parametrize("form_of", [dict, lambda **settings: serve.BackendConfig(**settings)], ids=["dict", "BackendConfig"])
def test_replicas_are_added_and_removed_beside_the_ones_that_stay(
    client: serve.Client, deploy: Deploy, form_of: Callable[..., Any]
) -> None:
    name = deploy(tag_of_replica, num_replicas=2)
    two = tags(client, name, at_least=2)
    assert len(two) == 2
    client.update_backend_config(name, form_of(num_replicas=3))
    three = wait_until(lambda: found if len(found := tags(client, name)) == 3 else set())
    assert two < three
    client.update_backend_config(name, form_of(num_replicas=1))
    assert wait_until(lambda: found if len(found := tags(client, name)) == 1 else set()) < three


@pytest.mark.parametrize(
    "change",
    [{"max_concurrent_queries": 2}, {"request_timeout_s": 20.0}, {"max_queued_requests": 500}, {"sync_threads": 2}, {"max_attempts": 5}],
    ids=str,
)
def test_a_change_of_config_keeps_exactly_the_same_replicas(client: serve.Client, deploy: Deploy, change: dict[str, Any]) -> None:
    name = deploy(tag_of_replica, num_replicas=2)
    before = tags(client, name, at_least=2)
    client.update_backend_config(name, change)
    assert tags(client, name, at_least=2) == before and len(before) == 2


def test_a_new_bound_of_the_queue_takes_effect_without_a_lost_or_doubled_request(
    client: serve.Client, deploy: Deploy, tmp_path: Path
) -> None:
    """Its argument is frozen in the queue, so it takes a new one."""
    gate = Gate(tmp_path)

    def wait(request: Any) -> int:
        gate.pass_through(str(request.data))
        return int(request.data)

    name = deploy(wait, sync_threads=2)
    handle = client.get_handle(name)
    before = [handle.remote(number) for number in range(20)]
    wait_until(lambda: gate.came == 2)
    client.update_backend_config(name, {"max_queued_requests": 5})
    after = [handle.remote(number) for number in range(20, 40)]
    refused = wait_until(lambda: [ref for ref in after if ref.done()])
    gate.open()
    assert serve.get(before, timeout=30) == list(range(20))
    served = [ref for ref in after if ref not in refused]
    for ref in refused:
        with pytest.raises(serve.Overloaded):
            ref.result(30)
    wait_until(lambda: all(ref.done() for ref in served))
    answered = sorted(gate.names, key=int)
    assert len(answered) == len(set(answered)), "a request ran twice"
    assert set(map(str, range(20))) <= set(answered)


def test_a_shorter_request_timeout_applies_to_the_next_request(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def wait(request: Any) -> str:
        gate.pass_through()
        return "passed"

    name = deploy(wait)
    client.update_backend_config(name, {"request_timeout_s": 0.3})
    with pytest.raises(serve.RequestTimeout):
        client.get_handle(name).remote().result(30)
    gate.open()
