"""Tasks of one event loop that wait until something has changed, and then look again."""

from __future__ import annotations

import asyncio


class Waiters:
    """Check what you wait for, then `await wait()`, in a loop: `wake` may come for another reason."""

    def __init__(self) -> None:
        self._futures: list[asyncio.Future[None]] = []

    def __repr__(self) -> str:
        return f"<Waiters, {len(self._futures)} of them>"

    async def wait(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._futures.append(future)
        await future

    def wake(self) -> None:
        futures, self._futures = self._futures, []
        for future in futures:
            if not future.done():  # its task was cancelled
                future.set_result(None)
