"""Queues on RabbitMQ in which messages wait, and from which it moves them back to where they are taken."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence

from ..errors import NotRouted
from .topology import RabbitTopology

# What has left one queue and is not yet in the other is counted in neither.
_MOVE_S = 1.0
# A quorum queue that RabbitMQ has made less than a second before it crashes comes back empty: its name was not on disk yet.
FRESH_S = 3.0


class RabbitWaits:
    """The queues that lead back to the queue `target`, one for each time: `name_of` is given the seconds, which are its routing key on
    `exchange`, too."""

    def __init__(self, topology: RabbitTopology, exchange: str, target: str, name_of: Callable[[int], str], waits_s: Sequence[int]) -> None:
        self._topology = topology
        self._exchange = exchange
        self._target = target
        self._name_of = name_of
        self._waits_s = waits_s
        self._fresh_until: dict[int, float] = {}  # by the seconds, of queues that are there; monotonic
        self._declaring = asyncio.Lock()  # many messages that wait for as long come at once

    def __repr__(self) -> str:
        return f"<RabbitWaits that lead to {self._target!r}>"

    async def fresh_s(self, wait_s: int) -> float:
        """Makes sure that there is a queue for that time, and that it is of our kind: another kind might lose what it moves. Returns for
        how long it is too fresh to take messages. Raises the broker's errors."""
        if wait_s not in self._fresh_until:
            async with self._declaring:
                if wait_s not in self._fresh_until:
                    await self._declare(wait_s)
        return max(0.0, self._fresh_until[wait_s] - time.monotonic())

    async def _declare(self, wait_s: int) -> None:
        name = self._name_of(wait_s)
        (count,) = await self._topology.count_all([name])
        await self._topology.declare_wait(name, self._exchange, wait_s)
        self._fresh_until[wait_s] = time.monotonic() + FRESH_S if count is None else -math.inf

    async def put(self, wait_s: int, publish: Callable[[str], Awaitable[None]]) -> None:
        """Publishes by `publish`, which is given the routing key, to the queue for that time, once that is not fresh. Raises the broker's
        errors."""
        try:
            await self._put(wait_s, publish)
        except NotRouted:  # the broker came back empty, or another leader has deleted the queue
            self._fresh_until.pop(wait_s, None)
            await self._put(wait_s, publish)

    async def _put(self, wait_s: int, publish: Callable[[str], Awaitable[None]]) -> None:
        await asyncio.sleep(await self.fresh_s(wait_s))
        await publish(str(wait_s))

    async def delete_if_empty(self) -> None:
        """Deletes `target` and these queues, unless there is a message in one of them, or `target` is in use. RabbitMQ refuses to delete a
        quorum queue only if it is empty. So each is unbound before all are counted: what is published meanwhile finds no queue, and has it
        declared again."""
        waits = {str(wait_s): self._name_of(wait_s) for wait_s in self._waits_s}
        names = [self._target, *waits.values()]
        counts = await self._topology.count_all(names)
        if any(counts):
            return
        there = {key: name for (key, name), count in zip(waits.items(), counts[1:], strict=True) if count is not None}
        if there:
            self._fresh_until.clear()
            for key, name in there.items():
                await self._topology.unbind_queue(name, self._exchange, key)
            await asyncio.sleep(_MOVE_S)
            if any(await self._topology.count_all(names)):
                return
        if await self._topology.delete_queue(self._target, only_if_empty=True):
            for name in there.values():
                await self._topology.delete_queue(name, only_if_empty=False)
