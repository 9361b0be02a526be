"""Tasks of one event loop that wait until something has changed, and then look again."""

from __future__ import annotations

import asyncio


class Waiters:
    """Check what you wait for, then `await wait()`, in a loop: `wake` may come for another reason."""

    def __init__(self) -> None:
        self._futures: dict[asyncio.Future[None], None] = {}  # in the order in which they came

    def __repr__(self) -> str:
        return f"<Waiters, {len(self._futures)} of them>"

    async def wait(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._futures[future] = None
        try:
            await future
        finally:  # it was cancelled, by a timeout for example; else `wake` has taken it away
            self._futures.pop(future, None)

    def wake(self) -> None:
        futures, self._futures = self._futures, {}
        for future in futures:
            if not future.done():  # its task was cancelled
                future.set_result(None)
