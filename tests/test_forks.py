"""Handlers with pools and children of their own, and forked children of a program that uses an instance. In both forms."""

import asyncio
import concurrent.futures
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import mqserve as serve
from mqserve.broker.process import forks
from tests.children import MANY_THREADS, await_one, end_children, in_a_child, leave_a_child, wait_for_exit
from tests.gates import Gate
from tests.instances import CommandLine, Deploy, distributed_only, wait_until
from tests.tallies import Tally

pytestmark = MANY_THREADS


def use_pool(request: serve.Request) -> int:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return sum(pool.map(abs, [1, 2, -3]))


def use_executor(request: serve.Request) -> int:
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        return sum(pool.map(abs, [1, 2, -3]))


def use_spawned(request: serve.Request) -> int:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(abs, [1, 2, -3]))


def use_forkserver(request: serve.Request) -> int:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        return sum(pool.map(abs, [1, 2, -3]))


def use_subprocess(request: serve.Request) -> int:
    return int(subprocess.run(["echo", "6"], capture_output=True, preexec_fn=os.setsid, check=True).stdout)


def use_terminated(request: serve.Request) -> int:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join(20)
    return 6 if child.exitcode == -signal.SIGTERM else 0


def use_its_own_loop(request: serve.Request) -> int:
    async def six() -> int:
        await asyncio.sleep(0.01)
        return 6

    pid = os.fork()
    if not pid:
        os._exit(asyncio.run(six()))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


async def use_from_async(request: serve.Request) -> int:
    pid = os.fork()
    if not pid:
        os._exit(6)
    return os.waitstatus_to_exitcode((await asyncio.to_thread(os.waitpid, pid, 0))[1])


def use_with_exit(request: serve.Request) -> int:
    pid = os.fork()
    if not pid:
        sys.exit(6)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


WAYS = [
    use_pool, use_executor, use_spawned, use_forkserver, use_subprocess, use_terminated, use_its_own_loop, use_from_async, use_with_exit,
]  # fmt: skip


def name_of(way: Callable[..., Any]) -> str:
    return way.__name__


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("way", WAYS, ids=name_of)
def test_a_handler_that_uses_processes_is_answered(deploy: Deploy, way: Any, threads: int) -> None:
    url = deploy.at(way, sync_threads=threads)
    with httpx.Client() as pool:
        assert [pool.get(url).json() for _ in range(3)] == [6, 6, 6]


def test_a_replica_goes_on_after_its_children_were_terminated(deploy: Deploy) -> None:
    def terminate(request: serve.Request) -> int:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join(20)
        return os.getpid()

    url = deploy.at(terminate)
    with httpx.Client() as pool:
        assert len({pool.get(url).json() for _ in range(5)}) == 1


def test_a_child_knows_which_replica_it_was_forked_in_and_by_when_its_request_wants_its_answer(deploy: Deploy) -> None:
    def fork(request: serve.Request) -> bool:
        mine = serve.get_replica_context()
        pid = os.fork()
        if not pid:
            os._exit(6 if serve.get_replica_context() == mine and not serve.cancelled() else 1)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 6

    assert httpx.get(deploy.at(fork)).json() is True


@pytest.mark.parametrize("threads", [1, 2])
def test_a_child_that_comes_back_from_its_handler_runs_none_of_what_waits(deploy: Deploy, tmp_path: Path, threads: int) -> None:
    tally, gate = Tally(tmp_path), Gate(tmp_path)

    def fork(request: serve.Request) -> str:
        gate.pass_through()
        if request.query_params["forks"] == "no":
            tally.note("ran")
            return "ran"
        pid = os.fork()
        if pid:
            tally.note(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return "forked"

    url = deploy.at(fork, sync_threads=threads, max_concurrent_queries=20)
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        first = pool.submit(httpx.get, f"{url}?forks=yes")
        wait_until(lambda: gate.came == 1)
        others = [pool.submit(httpx.get, f"{url}?forks=no") for _ in range(8)]
        wait_until(lambda: gate.came == threads)
        time.sleep(0.2)  # the others wait in the replica by now, most of them
        gate.open()
        assert first.result().text == "forked" and [other.result().text for other in others] == ["ran"] * 8
    assert sorted(tally.lines) == [str(forks.CAME_BACK_EXIT), *["ran"] * 8]


def test_a_child_that_comes_back_from_a_constructor_ends_there(deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)

    class Forks:
        def __init__(self) -> None:
            pid = os.fork()
            if pid:
                tally.note(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

        def __call__(self, request: serve.Request) -> str:
            return "served"

    assert httpx.get(deploy.at(Forks)).text == "served"
    assert tally.lines == [str(forks.CAME_BACK_EXIT)]


def test_a_connection_that_a_proxy_closes_is_closed_though_a_child_was_forked_while_it_was_open(deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    url = httpx.URL(deploy.at(leave_a_child(tally)))
    try:
        with socket.create_connection((url.host, url.port or 80), timeout=20) as connection, connection.makefile("rb") as answer:
            connection.sendall(f"GET {url.path} HTTP/1.1\r\nHost: {url.host}\r\nConnection: close\r\n\r\n".encode())
            assert answer.read().endswith(b"forked")  # to the end
    finally:
        end_children(tally)


# Handles and clients in a child.


@distributed_only
def test_a_handler_calls_another_backend_from_a_child_of_its(deploy: Deploy) -> None:
    other = deploy(lambda request: request.data + 1)

    def fork(request: serve.Request) -> int:
        handle = serve.get_handle(other)
        assert handle.remote(1).result(30) == 2
        pid = os.fork()
        if not pid:
            os._exit(handle.remote(5).result(30))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert httpx.get(deploy.at(fork)).json() == 6


@distributed_only
def test_a_child_of_the_clients_process_uses_handles_and_clients_as_its_parent_does(client: serve.Client, deploy: Deploy) -> None:
    name = deploy(lambda request: (request.data, request.query_params.get("x")))
    handle = client.get_handle(name)
    assert handle.remote("parent").result(30) == ("parent", None)

    def use() -> Any:
        inner = handle.remote(1)
        asynchronous = asyncio.run(await_one(client.get_handle(name, sync=False)))
        return [
            handle.remote("child").result(30),
            handle.options(shard_key="a").remote("child", x=2).result(30),
            serve.get([handle.remote(1), handle.remote(2)]),
            handle.remote(inner, x=inner).result(30),
            asynchronous,
            name in client.list_backends(),
            client.http_url(),
        ]

    ones = (1, None)
    expected = [("child", None), ("child", 2), [ones, (2, None)], (ones, ones), ("async", None), True, client.http_url()]
    assert [in_a_child(use) for _ in range(2)] == [expected, expected]
    assert handle.remote("parent").result(30) == ("parent", None)


@distributed_only
def test_a_child_waits_for_what_its_parent_sent_and_may_cancel_it(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def work(request: serve.Request) -> str:
        await gate.pass_through_async()
        return "done"

    handle = client.get_handle(deploy(work, max_concurrent_queries=10))
    waited, given_up, quick = handle.remote(), handle.remote(), client.get_handle(deploy(lambda request: "quick")).remote()
    assert quick.result(30) == "quick"
    wait_until(lambda: gate.came == 2)

    def use() -> Any:
        assert quick.done() and quick.result() == "quick"
        assert not waited.done() and "parent" not in repr(waited)
        assert given_up.cancel()
        with pytest.raises(serve.Cancelled):
            given_up.result(30)
        assert serve.wait([waited], timeout=0.1) == ([], [waited])
        gate.open()
        return waited.result()

    assert in_a_child(use) == "done"
    assert waited.result(30) == "done"
    with pytest.raises(serve.Cancelled):
        given_up.result(30)


@pytest.mark.parametrize("way", ["exits", "shuts down", "exits after a call"])
def test_a_child_that_ends_leaves_the_instance_to_its_parent(client: serve.Client, deploy: Deploy, form: str, way: str) -> None:
    url, name = deploy.named(lambda request: "served")
    handle = client.get_handle(name)
    pid = os.fork()
    if not pid:
        try:
            if way == "exits after a call" and form == "distributed":
                handle.remote().result(30)
            if way == "shuts down":
                client.shutdown()
            else:
                import atexit

                atexit._run_exitfuncs()
        finally:
            os._exit(0)
    assert wait_for_exit(pid) == 0
    assert httpx.get(url).text == "served" and handle.remote().result(30) == "served"


@distributed_only
def test_a_pre_forking_server_joins_before_it_forks_and_its_workers_call(joining: CommandLine, deploy: Deploy) -> None:
    name = deploy(lambda request: request.data * 2)
    script = """
import os, sys, threading, time
import mqserve as serve

handle = serve.connect().get_handle(sys.argv[1])
assert handle.remote(1).result(30) == 2
stop = threading.Event()
threading.Thread(target=lambda: [handle.remote(0).result(30) for _ in iter(stop.is_set, True)]).start()  # forks meet it at work
workers = []
for number in range(6):
    pid = os.fork()
    if not pid:
        time.sleep(0.05)
        assert handle.remote(number).result() == number * 2
        sys.exit(10 + number)
    workers.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
stop.set()
print(codes, handle.remote(21).result(30))
"""
    ran = joining.python(script, name)
    assert ran.stdout == "[10, 11, 12, 13, 14, 15] 42\n", ran.stderr
