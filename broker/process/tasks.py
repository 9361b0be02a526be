"""Background tasks that have an owner. It keeps a reference to each until it ends, and cancels them when it ends itself; and tasks that may
outlive whoever waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

Task = asyncio.Task[None]


def read_error(future: asyncio.Future[Any]) -> None:
    """Reads the error of a future that perhaps nobody waits for any more: asyncio reports one that was not read. A callback for its end."""
    if not future.cancelled():
        future.exception()


class Tasks:
    """The tasks of one owner. `on_end` is called with each task that has ended."""

    def __init__(self, on_end: Callable[[Task], None] | None = None) -> None:
        self._tasks: set[Task] = set()
        self._on_end = on_end

    def __repr__(self) -> str:
        return f"<Tasks, {len(self)} under way>"

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, None]) -> Task:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def wait(self, at_most_s: float) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=at_most_s)

    def _ended(self, task: Task) -> None:
        self._tasks.discard(task)
        if self._on_end is not None:
            self._on_end(task)
