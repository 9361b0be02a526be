"""What a forked child does not get of ours, whichever moment it is forked in, and what it keeps of the user's."""

import asyncio
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from mqserve.broker.process import forks
from mqserve.broker.process.loops import IoLoop, WorkerLoop
from tests.children import MANY_THREADS, in_a_child, living_child, sockets, wait_for_exit
from tests.instances import CommandLine

pytestmark = MANY_THREADS

FORKS = 60


def is_socket(fd: int) -> bool:
    with suppress(OSError):
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    return False


@contextmanager
def running(loop: WorkerLoop) -> Iterator[WorkerLoop]:
    """A loop on a thread of its own."""
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def call(loop: WorkerLoop, work: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(work, loop).result(30)


@contextmanager
def on_and_on(loop: WorkerLoop, work: Any) -> Iterator[None]:
    """Does it again and again on the loop while the block runs."""

    over = threading.Event()

    async def go_on() -> None:
        while not over.is_set():
            await work()

    going = asyncio.run_coroutine_threadsafe(go_on(), loop)
    try:
        yield
    finally:
        over.set()
        going.result(30)


@pytest.fixture
def peer() -> Iterator[tuple[str, int]]:
    """A server that says nothing, and takes the next connection when the last one is closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    with listener.accept()[0] as connection:
                        connection.recv(1)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_child_has_none_of_our_connections_in_whichever_moment_of_theirs_it_is_forked(peer: tuple[str, int]) -> None:
    async def connect() -> None:
        _, writer = await asyncio.open_connection(*peer)
        await asyncio.sleep(0)
        writer.close()
        await writer.wait_closed()

    with running(IoLoop()) as loop, on_and_on(loop, connect):
        found = [in_a_child(lambda: [other for _, other in sockets() if other == peer]) for _ in range(FORKS)]
    assert found == [[]] * FORKS


def test_a_child_has_neither_the_listener_nor_a_connection_that_came_to_it() -> None:
    with running(IoLoop()) as loop, forks.guarded_socket(socket.AF_INET) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)
        address = listener.getsockname()
        with forks.guarded_service(listener):
            server = call(loop, asyncio.start_server(lambda reader, writer: writer.close(), sock=listener))

            async def visit() -> None:
                with socket.create_connection(address) as visitor:
                    visitor.setblocking(False)
                    await loop.sock_recv(visitor, 1)

            with on_and_on(loop, visit):
                found = [in_a_child(lambda: [own for own, _ in sockets() if own == address]) for _ in range(FORKS)]
            server.close()
            call(loop, server.wait_closed())
    assert found == [[]] * FORKS


def test_a_child_that_is_forked_while_a_socket_of_ours_is_made_does_not_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = threading.Event()

    class SlowlyMade(socket.socket):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.set()
            time.sleep(0.2)

    monkeypatch.setattr(socket, "socket", SlowlyMade)
    kept: list[socket.socket] = []
    thread = threading.Thread(target=lambda: kept.append(forks.guarded_socket(socket.AF_INET)))
    thread.start()
    made.wait()
    numbers = in_a_child(lambda: [fd for fd in map(int, os.listdir("/dev/fd")) if is_socket(fd)])
    thread.join()
    with kept[0]:
        assert kept[0].fileno() not in numbers


def test_what_is_ours_is_nothing_in_a_child_and_its_number_stays_taken() -> None:
    here, there = socket.socketpair()
    with forks.guard(here), there:
        number = here.fileno()

        def look() -> tuple[bytes, int]:
            """What it reads, and the number that a file has which is opened next."""
            return os.read(number, 1), os.open(os.devnull, os.O_RDONLY)

        said, next_number = in_a_child(look)
        assert said == b"" and next_number != number
        here.send(b"!")
        assert there.recv(1) == b"!", "the parent's goes on"


def test_a_pipe_of_ours_closes_with_our_end_of_it_though_a_child_lives() -> None:
    reading, writing = forks.guarded_pipe()
    with living_child(), reading:
        writing.close()
        assert select.select([reading], [], [], 10)[0], "it is still open in the child"
        assert reading.read() == b""


def test_a_child_keeps_what_the_user_opened() -> None:
    here, there = socket.socketpair()
    with here, there, socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as visitor:
        connection, _ = listener.accept()
        with connection:
            in_a_child(lambda: (here.send(b"a"), connection.send(b"b")))
            assert (there.recv(1), visitor.recv(1)) == (b"a", b"b")


def test_what_was_closed_and_its_number_given_to_the_user_is_the_users() -> None:
    ours = forks.guarded_socket(socket.AF_INET)
    number = ours.fileno()
    ours.close()
    here, there = socket.socketpair()
    with here, there:
        assert here.fileno() == number
        in_a_child(lambda: here.send(b"!"))
        assert there.recv(1) == b"!"


def test_a_lock_of_ours_is_free_in_a_child_whoever_held_it() -> None:
    lock, held, done = forks.Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait()

    def take() -> str:
        with lock:
            return "taken"

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert in_a_child(take) == "taken"
    finally:
        done.set()
        thread.join()


def test_a_child_forked_on_a_loop_runs_loops_of_its_own_and_does_not_disturb_it() -> None:
    async def fork() -> int:
        return in_a_child(lambda: asyncio.run(asyncio.sleep(0.01, os.getpid())))

    with running(WorkerLoop()) as loop:
        for _ in range(10):
            assert call(loop, fork()) != os.getpid()
        assert call(loop, asyncio.sleep(0.01, "goes on")) == "goes on"


@pytest.mark.parametrize("awaits", [False, True])
def test_a_child_that_comes_back_to_the_loop_it_was_forked_on_ends(awaits: bool) -> None:
    async def fork() -> int:
        pid = os.fork()
        if not pid and awaits:
            await asyncio.sleep(0.01)
            os._exit(1)
        return pid

    with running(WorkerLoop()) as loop:
        assert wait_for_exit(call(loop, fork())) == forks.CAME_BACK_EXIT


def test_a_child_that_comes_back_to_a_loop_takes_none_of_its_parents_events() -> None:
    async def fork() -> int:
        return os.fork()

    def wake(loop: WorkerLoop) -> None:
        while not over.is_set():
            call(loop, asyncio.sleep(0))

    over = threading.Event()
    with running(WorkerLoop()) as loop, ThreadPoolExecutor(2) as threads:
        waking = [threads.submit(wake, loop) for _ in range(2)]
        try:
            for _ in range(FORKS):
                wait_for_exit(call(loop, fork()))
        finally:
            over.set()
        for one in waking:
            one.result()


def test_a_child_that_is_forked_by_the_first_thing_a_loop_does_takes_none_of_its_wake_ups() -> None:
    loop, forked = WorkerLoop(), threading.Event()

    def fork() -> None:
        loop.call_soon_threadsafe(int)  # it is woken once more, and sees that only after its child had the chance
        if pid := os.fork():
            wait_for_exit(pid)
            forked.set()

    loop.call_soon(fork)
    with running(loop):
        assert forked.wait(30)
        assert call(loop, asyncio.sleep(0, "woken")) == "woken"


def test_a_signal_for_a_child_is_the_childs_even_in_its_first_moment(shell: CommandLine) -> None:
    script = """
import asyncio, os, signal, threading, time
from mqserve.broker.process.lifeline import run, stop_event

def fork_and_terminate():
    pid = os.fork()
    if not pid:
        time.sleep(20)
        os._exit(1)
    os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

async def main():
    stop = stop_event()
    for _ in range(200):
        code = await asyncio.to_thread(fork_and_terminate)
        assert code == -signal.SIGTERM, code
    await asyncio.sleep(0.1)
    assert not stop.is_set(), "a signal for a child has stopped its parent"
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(stop.wait(), 10)
    print("all were the children's")
    return 0

raise SystemExit(run(main()))
"""
    ran = shell.python(script)
    assert ran.stdout == "all were the children's\n", ran.stderr


def test_a_child_has_pythons_own_handlers_where_ours_were_and_the_users_where_they_set_some(shell: CommandLine) -> None:
    script = """
import asyncio, os, signal
from mqserve.broker.process.lifeline import run, stop_event

async def main():
    stop_event()
    mine = signal.signal(signal.SIGINT, lambda *_: None) and signal.getsignal(signal.SIGINT)
    def fork():
        pid = os.fork()
        if not pid:
            os._exit((signal.getsignal(signal.SIGTERM) is signal.SIG_DFL) + 2 * (signal.getsignal(signal.SIGINT) is mine))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(await asyncio.to_thread(fork))
    return 0

raise SystemExit(run(main()))
"""
    ran = shell.python(script)
    assert ran.stdout == "3\n", ran.stderr
