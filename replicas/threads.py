"""Threads for plain calls. Unlike those of a ThreadPoolExecutor they do not keep the program from ending: a call may never end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

logger = logging.getLogger(__name__)


class Threads:
    """At most `count` of them, started as calls come; `enter` is called first in each."""

    def __init__(self, count: int, name: str, enter: Callable[[], None]) -> None:
        self._count = count
        self._name = name
        self._enter = enter
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._started: set[threading.Thread] = set()

    def __repr__(self) -> str:
        return f"<Threads {len(self._started)} of {self._count}>"

    def submit(self, call: Callable[[], None]) -> None:
        """Raises RuntimeError where no thread can be started, and none is there that would get to it."""
        if len(self._started) < self._count:
            thread = threading.Thread(target=self._work, name=f"{self._name}_{len(self._started)}", daemon=True)
            self._started.add(thread)
            try:
                thread.start()
            except RuntimeError:
                self._started.discard(thread)
                if not self._started:
                    raise
        self._calls.put(call)

    def shutdown(self) -> None:
        """Each ends when it has nothing left to do."""
        for _ in range(len(self._started)):
            self._calls.put(None)

    def _work(self) -> None:
        try:
            self._enter()
            while (call := self._calls.get()) is not None:
                try:
                    call()
                except Exception:
                    logger.exception("a call of user code failed in its thread: that is a bug in mqserve, please report it")
                del call  # or an idle thread would keep its request
        finally:
            self._started.discard(threading.current_thread())
