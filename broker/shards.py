"""How the requests of a backend with several queues (`queue_shards`) are spread over them, and its limits divided among them."""

from __future__ import annotations

import random
from collections.abc import Mapping

from .errors import MQServeError, NotRouted, Overloaded

FIRST = (0,)  # the queues to try where there is only the first
TRIES = 3  # as many queues are tried for one request while each is full


def shares(total: int, shards: int) -> list[int]:
    """Divides a limit among the queues: each has at least 1, and the sum is `total` where that is not less than the number of queues."""
    return [max(1, total // shards + (shard < total % shards)) for shard in range(shards)]


def other_shards(tried: tuple[int, ...], error: MQServeError) -> tuple[int, ...]:
    """Returns the queues to try after the first of `tried` did not take a request; empty if there is none. A queue that does not exist yet,
    or any more, is a sender's mistake about their number: every backend has the first one."""
    if isinstance(error, Overloaded):
        return tried[1:]
    return FIRST if isinstance(error, NotRouted) and tried[0] else ()


class RoundRobin:
    """One sender's round robin over the queues of each backend that has more than one."""

    def __init__(self) -> None:
        self._shards: Mapping[str, int] = {}
        self._next: dict[str, int] = {}
        self.is_needed = False  # whether any backend has more than one

    def __repr__(self) -> str:
        return f"<RoundRobin over {dict(self._shards)}>"

    def keep(self, shards: Mapping[str, int]) -> None:
        """Spreads over so many queues from now on. Each backend begins anywhere, so that senders do not go round together."""
        self._shards = {backend: count for backend, count in shards.items() if count > 1}
        self.is_needed = bool(self._shards)
        self._next = {backend: self._next.get(backend, random.randrange(count)) for backend, count in self._shards.items()}

    def take(self, backend: str) -> tuple[int, ...]:
        """Returns the queues to try for the next request, in this order."""
        count = self._shards.get(backend, 1)
        if count == 1:
            return FIRST
        first = self._next[backend]
        self._next[backend] = first + 1
        return tuple((first + later) % count for later in range(min(count, TRIES)))
