"""Work in a thread that no process waits for when it ends: a disk or a name server may never answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def in_daemon_thread(name: str, work: Callable[[], T], on_end: Callable[[], None] = lambda: None) -> T:
    """Returns what the work returns, or raises what it raises. If the caller is cancelled, the thread goes on. `on_end` is called in the
    event loop once it has ended."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def end(settle: Callable[[Any], None], outcome: Any) -> None:
        on_end()
        if not done.done():
            settle(outcome)

    def tell(settle: Callable[[Any], None], outcome: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(end, settle, outcome)

    def run() -> None:
        try:
            outcome = work()
        except Exception as error:
            tell(done.set_exception, error)
        else:
            tell(done.set_result, outcome)

    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError:  # the machine has no more of them
        on_end()
        raise
    return await done
