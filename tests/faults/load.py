"""A steady load of requests over kept-alive connections, none of them tried twice, and what came of each."""

import threading
import time
from collections import Counter
from types import TracebackType
from typing import Self

import httpx


class Load:
    """So many requests a second from entry to exit. `answers` counts them by (status, text); a request without an answer has status 0."""

    def __init__(self, url: str, rate: float = 50, connections: int = 5) -> None:
        self._url = url
        self._pause_s = connections / rate
        self._answers: Counter[tuple[int, str]] = Counter()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(connections)]

    def __repr__(self) -> str:
        return f"<Load of {self.count} requests: {self.answers.most_common(5)}>"

    @property
    def answers(self) -> Counter[tuple[int, str]]:
        with self._lock:
            return Counter(self._answers)

    @property
    def count(self) -> int:
        return self.answers.total()

    @property
    def failed(self) -> dict[tuple[int, str], int]:
        return {answer: count for answer, count in self.answers.items() if answer[0] != 200}

    @property
    def texts(self) -> set[str]:
        return {text for _, text in self.answers}

    def _ask(self) -> None:
        with httpx.Client(timeout=60) as http:
            while not self._ended.is_set():
                began = time.monotonic()
                try:
                    response = http.get(self._url)
                    answer = response.status_code, response.text[:200]
                except httpx.HTTPError as error:
                    answer = 0, repr(error)
                with self._lock:
                    self._answers[answer] += 1
                self._ended.wait(max(0.0, self._pause_s - (time.monotonic() - began)))

    def wait_for(self, more: int, deadline_s: float = 30) -> None:
        """Until so many more were answered."""
        wanted, until = self.count + more, time.monotonic() + deadline_s
        while self.count < wanted:
            assert time.monotonic() < until, f"{self!r} has stopped"
            time.sleep(0.02)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.wait_for(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.wait_for(25)  # what comes after it is part of what is specified
        self._ended.set()
        for thread in self._threads:
            thread.join(70)
