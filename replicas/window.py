"""How many deliveries one replica holds just now: by its handler, its configuration, and the run time that its worker measures."""

from __future__ import annotations

from ..controller.state.config import BackendConfig
from .handler import Handler
from .prefetch import SLOW_CALL_S, must_give_back, prefetch, slots
from .worker import Worker


class Window:
    """`config` is replaced when the replica gets another one."""

    def __init__(self, config: BackendConfig, handler: Handler, worker: Worker) -> None:
        self.config = config
        self._handler = handler
        self._worker = worker

    def __repr__(self) -> str:
        return f"<Window of {self.size()}{', blocked' if self.is_blocked else ''}>"

    def size(self) -> int:
        """The prefetch: the requests that can run, and those that are fetched ahead."""
        limit = self.config.concurrency(self._handler.is_async)
        wanted = prefetch(self._slots, limit, self._worker.run_s, may_look_ahead=self._may_look_ahead)
        return max(wanted, self.config.queue_shards)  # at least one of each queue

    @property
    def is_blocked(self) -> bool:
        """Whether requests that were fetched ahead would wait behind a slow call."""
        return self._may_look_ahead and self._worker.blocked_s > SLOW_CALL_S

    @property
    def is_too_full(self) -> bool:
        """Whether the requests that have not started go back to the queue, see `must_give_back`."""
        least = max(self._slots, self.config.queue_shards)  # a new consumer would fetch that much again
        return self._may_look_ahead and must_give_back(self._worker.waiting, least, self.size(), self._worker.blocked_s)

    @property
    def _slots(self) -> int:
        config, is_async = self.config, self._handler.is_async
        batch_size = (config.max_batch_size or 1) if self._gathers else 0
        return slots(config.concurrency(is_async), is_async=is_async, sync_threads=config.sync_threads, batch_size=batch_size)

    @property
    def _gathers(self) -> bool:
        """Whether requests wait for a batch."""
        return self._handler.accepts_batch and (self._handler.is_async or self.config.max_batch_size is not None)

    @property
    def _may_look_ahead(self) -> bool:
        return not (self._handler.is_async or self._gathers or self.config.delivery == "at_most_once")
