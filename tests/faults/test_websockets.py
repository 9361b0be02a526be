"""WebSockets through two proxies and two replicas: every echo in order, and the right code for each session whose process ends."""

import asyncio
import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
import pytest
import redis
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

import mqserve as serve
from tests import socket_apps
from tests.faults.members import Members
from tests.instances import NOISE_S, distributed_only, is_alive, new_name, wait_until

pytestmark = [distributed_only, pytest.mark.row(32)]

HTTP_OPTIONS = {"workers": 2}
PER_SECOND = 10


class Crowd:
    """Sessions that say ten messages a second each, and compare what comes back. One that is closed connects again."""

    def __init__(self, url: str, size: int) -> None:
        self._url = url
        self._size = size
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._talk_together()))
        self.echoes = self.open = 0
        self.ends: list[tuple[int, int]] = []  # of sessions that the other side ended: replica's pid, code; 1006 without a close
        self.refused: Counter[str] = Counter()  # why handshakes failed
        self.wrong: list[str] = []

    def __repr__(self) -> str:
        ended = f"ended {dict(Counter(self.ends))}, refused {dict(self.refused)}"
        return f"<Crowd, {self.open} of {self._size} open, {self.echoes} echoes, {ended}, {self.wrong[:3]}>"

    @property
    def codes(self) -> Counter[int]:
        """With which sessions were ended by the other side."""
        return Counter(code for _, code in self.ends)

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(lambda: self.open == self._size, told=lambda: self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(60)

    def goes_on(self, echoes: int) -> bool:
        """Waits for so many more, of as many sessions as ever."""
        before = self.echoes
        return wait_until(lambda: self.echoes >= before + echoes and self.open == self._size, told=lambda: self)

    async def _talk_together(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(self._size):
                tasks.create_task(self._talk_again_and_again(number))

    async def _talk_again_and_again(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                async with connect(self._url, open_timeout=30) as socket:
                    self.open += 1
                    try:
                        await self._talk(socket, number)
                    except ConnectionClosed as closed:
                        assert socket.response is not None
                        replica = int(socket.response.headers["x-process"])
                        self.ends.append((replica, closed.rcvd.code if closed.rcvd is not None else 1006))
                        await asyncio.sleep(0.5)
                    finally:
                        self.open -= 1
            except (OSError, InvalidHandshake) as error:  # a process ended before it had answered the handshake
                self.refused[str(error)] += 1
                await asyncio.sleep(0.1)

    async def _talk(self, socket: Any, number: int) -> None:
        for turn in itertools.count():
            if self._stop.is_set():
                return
            due = time.monotonic() + 1 / PER_SECOND
            await socket.send(f"{number} {turn}")
            async with asyncio.timeout(30):
                heard = await socket.recv()
            if heard != f"{number} {turn}":
                self.wrong.append(f"{number} {turn}, and back came {heard}")
            self.echoes += 1
            await asyncio.sleep(max(0.0, due - time.monotonic()))


@pytest.fixture(scope="module")
def url(client: serve.Client) -> Iterator[str]:
    """The app, on two replicas."""
    name = new_name("ws")
    client.mount(f"/{name}", socket_apps.app, config={"num_replicas": 2, "graceful_shutdown_timeout_s": 1.0})
    yield f"{client.http_url().replace('http', 'ws', 1)}/{name}"
    client.delete_endpoint(name)
    client.delete_backend(name, force=True)


@pytest.fixture
def proxies(members: Members) -> Callable[[], set[int]]:
    return lambda: two(members.pids("proxy"))


@pytest.fixture
def replicas(members: Members) -> Callable[[], set[int]]:
    return lambda: two(members.pids("replica"))


def two(pids: set[int]) -> set[int]:
    alive = {pid for pid in pids if psutil.pid_exists(pid) and is_alive(psutil.Process(pid))}
    return alive if len(alive) == 2 else set()


def busiest(pids: set[int]) -> int:
    """The one with the most connections: which proxy takes one is chance, and on a busy machine one may take them all."""
    return max(pids, key=lambda pid: psutil.Process(pid).num_fds())


def test_two_hundred_sessions_get_every_echo_in_order(
    url: str, proxies: Callable[[], set[int]], replicas: Callable[[], set[int]], store_url: str, shared_namespace: str
) -> None:
    processes = [psutil.Process(pid) for pid in [*wait_until(proxies), *wait_until(replicas)]]
    with Crowd(f"{url}/echo", 20) as crowd:  # what is opened once and kept
        crowd.goes_on(100)
    before = [process.num_fds() for process in processes]
    with Crowd(f"{url}/echo", 200) as crowd:
        crowd.goes_on(200 * PER_SECOND * 5)
        shares = [process.num_fds() - count for process, count in zip(processes[:2], before[:2], strict=True)]
        assert sum(shares) >= 190 and min(shares) > 0  # which proxy takes a connection is chance
    assert not crowd.wrong and not crowd.codes and not crowd.refused, crowd
    wait_until(lambda: all(process.num_fds() <= count + 3 for process, count in zip(processes, before, strict=True)))
    keys = keys_of_requests(store_url, shared_namespace)
    assert -1 not in keys.values() and not any(":future:" in key for key in keys)  # sessions have no results
    wait_until(lambda: set(tasks_of(url)) == replicas() and max(tasks_of(url).values()) < 10)


def test_two_hundred_sessions_go_on_while_a_replica_and_a_proxy_are_killed(
    url: str, proxies: Callable[[], set[int]], replicas: Callable[[], set[int]], store_url: str, shared_namespace: str
) -> None:
    members = (proxies, replicas)
    with Crowd(f"{url}/echo", 20) as crowd:  # what is opened once and kept
        wait_until(lambda: proxies() and replicas())
        crowd.goes_on(100)
    before = [most_descriptors(pids()) for pids in members]
    with Crowd(f"{url}/echo", 200) as crowd:
        crowd.goes_on(200 * PER_SECOND * 5)
        replica = wait_until(replicas).pop()
        os.kill(replica, signal.SIGKILL)
        wait_until(lambda: crowd.ends, told=lambda: crowd)
        crowd.goes_on(200 * PER_SECOND * 8)
        ended = len(crowd.ends)
        os.kill(busiest(wait_until(proxies)), signal.SIGKILL)
        wait_until(lambda: len(crowd.ends) > ended, told=lambda: crowd)
        crowd.goes_on(200 * PER_SECOND * 7)
    assert not crowd.wrong, crowd
    assert set(crowd.ends[:ended]) == {(replica, 1012)} and {code for _, code in crowd.ends[ended:]} == {1006}, crowd
    for pids, most in zip(members, before, strict=True):
        wait_until(lambda pids=pids, most=most: (now := pids()) and most_descriptors(now) <= most + 3)  # type: ignore[misc]
    assert -1 not in keys_of_requests(store_url, shared_namespace).values()
    wait_until(lambda: set(tasks_of(url)) == replicas() and max(tasks_of(url).values()) < 10)


def most_descriptors(pids: set[int]) -> int:
    return max(psutil.Process(pid).num_fds() for pid in pids)


def tasks_of(url: str) -> dict[int, int]:
    """The tasks of the user's loop, by the process of the replica."""
    told = [httpx.get(f"{url.replace('ws', 'http', 1)}/tasks").json() for _ in range(8)]
    return {one["pid"]: one["tasks"] for one in told}


def keys_of_requests(store_url: str, namespace: str) -> dict[str, int]:
    """Each with the seconds until it expires; -1 if it does not."""
    store: Any = redis.Redis.from_url(store_url)
    found = [key for key in store.scan_iter(f"mqserve:{namespace}:*") if b"{" in key or b":feed:" in key or b":inbox:" in key]
    return {key.decode(): store.ttl(key) for key in found}


def test_a_replica_is_killed(url: str, replicas: Callable[[], set[int]]) -> None:
    victim = wait_until(replicas).pop()
    with Crowd(f"{url}/echo", 40) as crowd:
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        wait_until(lambda: crowd.codes, told=lambda: crowd)
        assert time.monotonic() - began < 2 + NOISE_S  # told by the node, and not by silence
        crowd.goes_on(400)
    assert not crowd.wrong and set(crowd.codes) == {1012} and 5 < crowd.codes[1012] < 35, crowd


def test_a_replica_is_told_to_end(url: str, replicas: Callable[[], set[int]]) -> None:
    victim = wait_until(replicas).pop()
    with Crowd(f"{url}/echo", 40) as crowd:
        os.kill(victim, signal.SIGTERM)
        wait_until(lambda: crowd.codes, told=lambda: crowd)
        crowd.goes_on(400)
    assert not crowd.wrong and set(crowd.codes) == {1012} and 5 < crowd.codes[1012] < 35, crowd


def test_a_replica_is_frozen(url: str, replicas: Callable[[], set[int]]) -> None:
    victim = wait_until(replicas).pop()
    with Crowd(f"{url}/echo", 10) as crowd:
        os.kill(victim, signal.SIGSTOP)
        try:
            wait_until(lambda: crowd.codes, told=lambda: crowd)
        finally:
            with suppress(ProcessLookupError):  # its node may have killed it
                os.kill(victim, signal.SIGCONT)
        crowd.goes_on(100)
    assert not crowd.wrong and set(crowd.codes) == {1012}, crowd


def test_a_proxy_is_killed(url: str, proxies: Callable[[], set[int]], replicas: Callable[[], set[int]]) -> None:
    assert wait_until(proxies) and wait_until(replicas)
    with Crowd(f"{url}/echo", 40) as crowd:
        os.kill(busiest(wait_until(proxies)), signal.SIGKILL)
        wait_until(lambda: crowd.codes, told=lambda: crowd)
        crowd.goes_on(400)
    assert not crowd.wrong and set(crowd.codes) == {1006}, crowd
    wait_until(lambda: max(tasks_of(url).values()) < 10)  # the apps were told


def test_a_proxy_is_told_to_end(url: str, proxies: Callable[[], set[int]]) -> None:
    assert wait_until(proxies)
    with Crowd(f"{url}/echo", 40) as crowd:
        os.kill(busiest(wait_until(proxies)), signal.SIGTERM)
        wait_until(lambda: crowd.codes, told=lambda: crowd)
        crowd.goes_on(400)
    assert not crowd.wrong and set(crowd.codes) == {1001}, crowd
