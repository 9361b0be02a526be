"""Forked children for tests: what a piece of code returns or raises in one, and which sockets it has there."""

import os
import pickle
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

import mqserve as serve
from tests.tallies import Tally

T = TypeVar("T")

# Python 3.12 and later warn of every fork beside threads, which is what these tests are about.
MANY_THREADS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def in_a_child(work: Callable[[], T], deadline_s: float = 30.0) -> T:
    """What `work` returns in a forked child; raises what it raises there. Fails where the child is silent past the deadline."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writing, _pickled(*_outcome(work)))
        finally:
            os._exit(0)  # or the child would go on as another run of the tests
    os.close(writing)
    try:
        said = _everything(reading, deadline_s)
    finally:
        os.close(reading)
        code = wait_for_exit(pid, 5.0)
    assert said, f"a forked child has ended with code {code} and said nothing"
    value, error = pickle.loads(said)
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


@contextmanager
def living_child() -> Iterator[int]:
    """A forked child that does nothing, with its number; killed at the end of the block."""
    pid = os.fork()
    if not pid:
        time.sleep(600)
        os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _outcome(work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return work(), None
    except BaseException as error:
        return None, error


def _pickled(value: Any, error: BaseException | None) -> bytes:
    try:
        return pickle.dumps((value, error))
    except Exception:
        return pickle.dumps((None, AssertionError("".join(traceback.format_exception(error)) if error else f"{value!r} does not pickle")))


def _everything(reading: int, deadline_s: float) -> bytes:
    until, said = time.monotonic() + deadline_s, b""
    readable = select.poll()
    readable.register(reading, select.POLLIN)
    while True:
        if not readable.poll(max(0.0, until - time.monotonic()) * 1000):
            pytest.fail(f"a forked child has not come to its end within {deadline_s:g} s")
        more = os.read(reading, 65536)
        if not more:
            return said
        said += more


def wait_for_exit(pid: int, deadline_s: float = 30.0) -> int:
    """The exit code of a child, negative for a signal. Kills one that goes on past the deadline, and fails."""
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail(f"a forked child has not ended within {deadline_s:g} s")


def sockets() -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """(own address, peer's address) of each connected socket of this process, whichever library made it."""
    for name in os.listdir("/dev/fd"):
        try:
            probe = socket.socket(fileno=int(name))
        except OSError:
            continue
        try:
            yield tuple(probe.getsockname()), tuple(probe.getpeername())
        except (OSError, TypeError):
            pass
        finally:
            probe.detach()


def leave_a_child(tally: Tally) -> Any:
    """A handler that forks a child which lives on, and tells its number."""

    def fork(request: serve.Request) -> str:
        pid = os.fork()
        if not pid:
            os.setsid()  # else it ends with its replica
            time.sleep(600)
            os._exit(0)
        tally.note(pid)
        return "forked"

    return fork


def end_children(tally: Tally) -> None:
    for pid in map(int, tally.lines):
        os.kill(pid, signal.SIGKILL)


async def await_one(handle: serve.AsyncHandle) -> Any:
    return await (await handle.remote("async"))
