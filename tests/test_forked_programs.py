"""Programs that fork while an instance of their own runs: what the child is told, and what it does not keep from ending."""

import asyncio
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import mqserve as serve
from mqserve.broker.process import forks
from mqserve.client import clients
from tests.children import MANY_THREADS, await_one, end_children, in_a_child, leave_a_child
from tests.gates import Gate
from tests.instances import CommandLine, Deploy, is_alive, started, wait_until
from tests.ports import free_port
from tests.tallies import Tally

pytestmark = MANY_THREADS


def test_a_child_of_an_embedded_instances_process_is_told_why_it_has_no_handles(tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def work(request: serve.Request) -> str:
        gate.pass_through()
        return "done"

    with started() as client:
        handle = client.get_handle(Deploy(client)(work))
        done, pending = handle.remote(), handle.remote()
        gate.open()
        assert done.result(30) == "done"
        wait_until(pending.done)
        closed = Gate(tmp_path)
        pending = client.get_handle(Deploy(client)(lambda request: closed.pass_through())).remote()

        def use() -> str:
            assert done.result() == "done" and "parent" in repr(pending)
            uses: list[Callable[[], Any]] = [
                lambda: handle.remote(1),
                lambda: asyncio.run(await_one(client.get_handle("a", sync=False))),
                pending.result,
                pending.done,
                lambda: serve.wait([pending]),
                client.list_endpoints,
                serve.list_backends,
                serve.connect,
                lambda: serve.get_handle("a"),
            ]
            words = set()
            for one in uses:
                with pytest.raises(serve.InstanceError) as told:
                    one()
                words.add(str(told.value))
            serve.shutdown()
            return "; ".join(sorted(words))

        words = in_a_child(use)
        closed.open()
        assert forks.NOT_HERE in words
        assert pending.result(30) is None


def test_a_child_of_an_embedded_instances_process_may_start_one_of_its_own() -> None:
    with started() as client:
        url = Deploy(client).at(lambda request: "the parent's")

        def start() -> tuple[str, str]:
            own = serve.start(http_options={"port": free_port()})
            own.create_backend("own", lambda request: "the child's")
            own.create_endpoint("own", backend="own", route="/own")
            answers = httpx.get(f"{own.http_url()}/own").text, httpx.get(url).text
            serve.shutdown()
            return answers

        assert in_a_child(start) == ("the child's", "the parent's")
        assert httpx.get(url).text == "the parent's"


def test_the_port_of_an_embedded_instance_is_free_after_its_end_though_a_forked_child_lives(tmp_path: Path) -> None:
    tally, port = Tally(tmp_path), free_port()
    try:
        with started(port=port) as client:
            assert httpx.get(Deploy(client).at(leave_a_child(tally))).text == "forked"
        with started(port=port) as client:
            assert httpx.get(Deploy(client).at(lambda request: "again")).text == "again"
    finally:
        end_children(tally)


def test_controller_and_node_end_with_the_program_that_started_them_though_a_child_of_it_lives(distributed_shell: CommandLine) -> None:
    script = f"""
import os, time
import mqserve as serve

serve.start(http_options={{"port": {free_port()}}})
child = os.fork()
if not child:
    os.setsid()
    time.sleep(300)
    os._exit(0)
print("forked", child, flush=True)
time.sleep(300)
"""
    program = distributed_shell.start_program([sys.executable, "-c", script])
    child = psutil.Process(int(program.wait_for("forked").removeprefix("forked ")))
    members = [process for process in program.descendants() if process != child]
    assert len(members) >= 3  # controller, node, proxy
    try:
        program.kill()
        wait_until(lambda: not any(is_alive(process) for process in members), 30, told=lambda: str(members))
        assert is_alive(child)
    finally:
        child.kill()


def test_a_child_of_what_mqserve_run_runs_ends_by_sigterm(shell: CommandLine) -> None:
    file = shell.file(
        "app.py",
        """
import multiprocessing, time
import mqserve as serve

@serve.endpoint("/")
def terminate(request):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join(20)
    return child.exitcode
""",
    )
    port = free_port()
    program = shell.start("run", file, "--port", str(port))
    program.wait_for("Serving on")
    assert [httpx.get(f"http://127.0.0.1:{port}/").json() for _ in range(2)] == [-signal.SIGTERM] * 2


def test_threads_that_connect_while_the_program_forks_do_not_lock_its_children_up() -> None:
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with clients.clients._opening:
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        with pytest.raises(serve.InstanceError, match="MQSERVE_BROKER_URL"):
            in_a_child(serve.connect)
    finally:
        over.set()
        thread.join()
