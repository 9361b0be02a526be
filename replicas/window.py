"""How many deliveries one replica holds just now: by its handler, its configuration, and the run time that its worker measures."""

from __future__ import annotations

import math

from ..controller.state.config import BackendConfig
from .handler import Handler
from .prefetch import SLOW_CALL_S, must_give_back, prefetch, slots
from .worker import Worker

_STEPS = 8  # of the prefetch, while jobs take a part of the places: each change costs a new consumer


class Window:
    """`config` is replaced when the replica gets another one. `jobs` is the number of jobs in hand, `lapsing` that of copies of jobs that
    run elsewhere."""

    def __init__(self, config: BackendConfig, handler: Handler, worker: Worker) -> None:
        self.config = config
        self._handler = handler
        self._worker = worker
        self.jobs = self.lapsing = 0

    def __repr__(self) -> str:
        return f"<Window of {self.size()}{', blocked' if self.is_blocked else ''}>"

    def size(self) -> int:
        """The prefetch: the requests that can run, and those that are fetched ahead. While there are jobs, those have their part."""
        limit = self.config.concurrency(self._handler.is_async)
        wanted = prefetch(self._slots, limit, self._worker.run_s, may_look_ahead=self._may_look_ahead)
        if self.jobs and not self._may_look_ahead:
            step = max(1, wanted // _STEPS)
            wanted -= math.ceil(self.jobs / step) * step
        return max(wanted, self.config.queue_shards)  # at least one of each queue

    def job_slots(self) -> int:
        """The prefetch of jobs. A copy that waits for a lease keeps no other job out: it may wait for long."""
        return self.config.held_jobs(self._handler.is_async) + self.lapsing

    def places(self) -> tuple[int, int]:
        """How many requests and jobs may be with the worker, and how many jobs: no more than can run, since those that have begun count as
        run if the replica dies. None while a slow call would keep them waiting: they go elsewhere then."""
        if self.is_blocked:
            return 0, 0
        return self.config.concurrency(self._handler.is_async) if self._may_look_ahead else self._slots, self._slots

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
