"""What replicas promise: how many run at once, and what happens when they die, drain or change. In both forms where both can."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import CommandLine, Deploy, distributed_only, wait_until


def tell_pid(request: serve.Request) -> int:
    return os.getpid()


def pids_of(url: str, at_least: int = 1) -> set[int]:
    """The processes that answer under a URL, once so many different ones have."""
    seen: set[int] = set()
    with httpx.Client() as pool:

        def ask() -> bool:
            seen.add(pool.get(url, timeout=30).json())
            return len(seen) >= at_least

        wait_until(ask)
    return seen


@contextmanager
def load(url: str, threads: int = 4) -> Iterator[list[int]]:
    """Requests without a pause while the block runs; the list has their statuses."""
    statuses: list[int] = []
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client() as pool:
            while not ended.is_set():
                statuses.append(pool.get(url, timeout=30).status_code)

    with ThreadPoolExecutor(threads) as executor:
        asking = [executor.submit(ask) for _ in range(threads)]
        wait_until(lambda: len(statuses) > 10)
        try:
            yield statuses
            enough = len(statuses) + 10
            wait_until(lambda: len(statuses) > enough)
        finally:
            ended.set()
        for future in asking:
            future.result(timeout=60)


# How many at once.


def test_a_plain_handler_runs_one_request_at_a_time(deploy: Deploy, tmp_path: Path) -> None:
    folder = tmp_path

    def work(request: serve.Request) -> bool:
        mark = folder / "busy"
        alone = not mark.exists()
        mark.touch()
        time.sleep(0.01)
        mark.unlink()
        return alone

    url = deploy.at(work)
    with ThreadPoolExecutor(8) as threads:
        assert all(response.json() for response in threads.map(lambda _: httpx.get(url, timeout=30), range(16)))


def test_sync_threads_run_so_many_at_once_and_no_more(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def work(request: serve.Request) -> str:
        gate.pass_through()
        return "passed"

    url = deploy.at(work, sync_threads=3)
    with ThreadPoolExecutor(5) as threads:
        asked = [threads.submit(httpx.get, url, timeout=30) for _ in range(5)]
        wait_until(lambda: gate.came == 3)
        assert not any(future.done() for future in asked)
        gate.open()
        assert [future.result().text for future in asked] == ["passed"] * 5


def test_async_requests_run_together_up_to_max_concurrent_queries(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def work(request: serve.Request) -> str:
        await gate.pass_through_async()
        return "passed"

    url = deploy.at(work, max_concurrent_queries=4)
    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(httpx.get, url, timeout=30) for _ in range(6)]
        wait_until(lambda: gate.came == 4)
        assert not any(future.done() for future in asked)
        gate.open()
        assert [future.result().text for future in asked] == ["passed"] * 6


def test_blocking_code_stalls_neither_the_proxy_nor_other_backends(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def block(request: serve.Request) -> None:
        gate.pass_through()  # not awaited: it holds the replica's whole loop

    def hello(request: serve.Request) -> str:
        return "hello"

    blocked, other = deploy.at(block), deploy.at(hello)
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(httpx.get, blocked, timeout=30) for _ in range(3)]
        wait_until(lambda: gate.came == 1)
        assert httpx.get(f"{deploy.url}/-/healthz", timeout=20).status_code == 200
        assert httpx.get(other, timeout=20).text == "hello"
        gate.open()
        assert [future.result().status_code for future in asked] == [200] * 3


# Starting.


class Broken:
    def __init__(self) -> None:
        raise LookupError("the model file is not there")

    def __call__(self, request: serve.Request) -> None: ...


def test_a_constructor_that_raises_is_reported_and_nothing_stays(client: serve.Client) -> None:
    with pytest.raises(serve.BackendFailed, match="LookupError: the model file is not there") as caught:
        client.create_backend("broken", Broken)
    assert "Traceback" in str(caught.value) and "__init__" in str(caught.value)
    assert "broken" not in client.list_backends()


def test_an_import_string_that_names_nothing_is_reported(client: serve.Client) -> None:
    with pytest.raises(serve.BackendFailed, match="no attribute 'missing'"):
        client.create_backend("missing", "json:missing")
    assert "missing" not in client.list_backends()


def test_a_constructor_that_takes_too_long_is_reported(client: serve.Client, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    class Slow:
        def __init__(self) -> None:
            gate.pass_through()

    with pytest.raises(serve.BackendFailed, match=r"start_timeout_s of 0\.3 s"):
        client.create_backend("slow", Slow, config={"start_timeout_s": 0.3})
    gate.open()


def test_constructor_arguments_reach_the_replica(deploy: Deploy) -> None:
    class Greeter:
        def __init__(self, greeting: str, marks: tuple[str, ...]) -> None:
            self.greeting, self.marks = greeting, marks

        def __call__(self, request: serve.Request) -> str:
            return self.greeting + "".join(self.marks)

    assert httpx.get(deploy.at(Greeter, "Hello", ("!", "?"))).text == "Hello!?"


# Dying.


@distributed_only
def test_killing_one_of_two_replicas_amid_200_requests_fails_none(deploy: Deploy) -> None:
    def work(request: serve.Request) -> int:
        time.sleep(0.01)
        return os.getpid()

    url = deploy.at(work, num_replicas=2)
    victim, survivor = pids_of(url, at_least=2)
    with httpx.Client() as pool, ThreadPoolExecutor(16) as threads:
        asked = [threads.submit(pool.get, url, timeout=60) for _ in range(200)]
        wait_until(lambda: sum(future.done() for future in asked) >= 50)
        os.kill(victim, signal.SIGKILL)
        responses = [future.result() for future in asked]
    assert [response.status_code for response in responses] == [200] * 200
    assert survivor in {response.json() for response in responses}


@distributed_only
def test_a_killed_replica_is_replaced(deploy: Deploy) -> None:
    url = deploy.at(tell_pid)
    (old,) = pids_of(url)
    os.kill(old, signal.SIGKILL)
    assert httpx.get(url, timeout=30).raise_for_status().json() != old


@distributed_only
def test_replicas_that_die_before_they_are_ready_wait_longer_each_time_and_say_why(
    client: serve.Client, deploy: Deploy, tmp_path: Path, environment: dict[str, str]
) -> None:
    broken = tmp_path / "broken"

    class Model:
        def __init__(self) -> None:
            if broken.exists():
                raise LookupError("the model file is not there")

        def __call__(self, request: serve.Request) -> int:
            return os.getpid()

    url = deploy.at(Model)
    (old,) = pids_of(url)
    broken.touch()
    os.kill(old, signal.SIGKILL)
    shell = CommandLine(tmp_path, **environment)
    wait_until(lambda: "LookupError: the model file is not there" in shell.run("status").stdout, told=lambda: shell.run("status").stdout)
    assert "failing" in shell.run("status").stdout
    broken.unlink()
    assert httpx.get(url, timeout=30).raise_for_status().json() != old


# Draining.


@distributed_only
def test_sigterm_finishes_what_runs_and_gives_back_what_has_not_started(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def work(request: serve.Request) -> int:
        if request.method == "POST":
            gate.pass_through(str(os.getpid()))
        return os.getpid()

    url = deploy.at(work, num_replicas=2)
    for _ in range(3):  # quick ones, after which replicas take some requests ahead
        pids_of(url, at_least=2)
    with ThreadPoolExecutor(12) as threads:
        asked = [threads.submit(httpx.post, url, timeout=60) for _ in range(12)]
        draining = int(wait_until(lambda: gate.names if gate.came == 2 else [])[0])
        os.kill(draining, signal.SIGTERM)
        gate.open()
        responses = [future.result() for future in asked]
    assert [response.status_code for response in responses] == [200] * 12
    assert gate.came == 12, "a request ran twice"
    wait_until(lambda: not psutil.pid_exists(draining))


@distributed_only
def test_a_replica_that_was_drained_is_replaced_at_once(deploy: Deploy) -> None:
    url = deploy.at(tell_pid)
    (old,) = pids_of(url)
    os.kill(old, signal.SIGTERM)
    wait_until(lambda: not psutil.pid_exists(old))
    assert httpx.get(url, timeout=30).raise_for_status().json() != old


# Changing.


@distributed_only
def test_num_replicas_is_followed_up_and_down_without_a_lost_request(client: serve.Client, deploy: Deploy) -> None:
    name = deploy(tell_pid, route="/scaled")
    url = f"{deploy.url}/scaled"
    with load(url) as statuses:
        client.update_backend_config(name, {"num_replicas": 3})
        three = pids_of(url, at_least=3)
        client.update_backend_config(name, {"num_replicas": 1})
        wait_until(lambda: sum(psutil.pid_exists(pid) for pid in three) == 1)
    assert set(statuses) == {200}


def test_new_code_rolls_out_under_load_without_a_failed_request(client: serve.Client, deploy: Deploy) -> None:
    def first(request: serve.Request) -> str:
        return "first"

    def second(request: serve.Request) -> str:
        return "second"

    name = deploy(first, route="/rolling", num_replicas=2)
    url = f"{deploy.url}/rolling"
    with load(url) as statuses:
        client.update_backend(name, second)
        wait_until(lambda: {httpx.get(url, timeout=30).text for _ in range(10)} == {"second"})
    assert set(statuses) == {200}


def test_new_code_that_does_not_start_is_refused_and_the_old_one_serves_on(client: serve.Client, deploy: Deploy) -> None:
    def good(request: serve.Request) -> str:
        return "good"

    name = deploy(good, route="/kept")
    with load(f"{deploy.url}/kept") as statuses, pytest.raises(serve.BackendFailed, match="the model file is not there"):
        client.update_backend(name, Broken)
    assert set(statuses) == {200}
    assert httpx.get(f"{deploy.url}/kept").text == "good"


def test_a_new_queue_limit_makes_a_new_queue_without_a_lost_request(client: serve.Client, deploy: Deploy) -> None:
    def hello(request: serve.Request) -> str:
        return "hello"

    name = deploy(hello, route="/limited")
    with load(f"{deploy.url}/limited") as statuses:
        client.update_backend_config(name, {"max_queued_requests": 500})
        client.update_backend_config(name, {"max_queued_requests": None})
    assert set(statuses) == {200}
    assert client.get_backend_config(name).max_queued_requests is None


def test_a_configuration_change_keeps_what_it_does_not_name(client: serve.Client, deploy: Deploy) -> None:
    def hello(request: serve.Request) -> str:
        return "hello"

    name = deploy(hello, max_queued_requests=50, request_timeout_s=7)
    client.update_backend_config(name, {"request_timeout_s": 9})
    config: Any = client.get_backend_config(name)
    assert (config.max_queued_requests, config.request_timeout_s, config.num_replicas) == (50, 9, 1)
