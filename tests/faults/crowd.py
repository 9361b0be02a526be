"""Requests while something happens to the system: without a pause, or evenly paced."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import httpx

from tests.instances import wait_until


class Crowd:
    """A few clients, each of which sends its next request when the last one has ended, while the block runs."""

    def __init__(self, url: str, clients: int = 4, timeout_s: float = 60) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]
        self.responses: list[httpx.Response] = []
        self.failures: list[httpx.TransportError] = []  # no HTTP answer at all
        self.slowest_s = 0.0

    def __repr__(self) -> str:
        return (
            f"<Crowd, {len(self.responses)} answered: {dict(Counter(self.statuses))}, slowest {self.slowest_s:.1f} s, {self.failures[:3]}>"
        )

    @property
    def statuses(self) -> list[int]:
        return [response.status_code for response in self.responses]

    def wait_for(self, more: int) -> None:
        """Until so many more requests were answered."""
        enough = len(self.responses) + more
        wait_until(lambda: len(self.responses) >= enough, told=lambda: self)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(self._timeout_s + 10)

    def _ask(self) -> None:
        limits = httpx.Limits(keepalive_expiry=1)  # below the server's, which else may close one that is just used
        with httpx.Client(timeout=self._timeout_s, limits=limits) as pool:
            while not self._ended.is_set():
                began = time.monotonic()
                try:
                    self.responses.append(pool.get(self._url))
                except httpx.TransportError as failure:
                    self.failures.append(failure)
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                time.sleep(0.01)  # enough to see every fault, and no benchmark


def paced(ask: Callable[[], Any], rate: float, stop: Callable[[], bool], threads: int = 8) -> list[Any]:
    """What so many asks a second return, evenly paced whatever each of them takes (as long as the threads suffice)."""
    turn = iter(range(10**9))
    began, lock = time.monotonic(), threading.Lock()

    def work() -> list[Any]:
        found = []
        while not stop():
            with lock:
                due = began + next(turn) / rate
            time.sleep(max(0.0, due - time.monotonic()))
            found.append(ask())
        return found

    with ThreadPoolExecutor(threads) as pool:
        return [answer for future in [pool.submit(work) for _ in range(threads)] for answer in future.result()]
