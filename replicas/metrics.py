"""The metrics of a replica. Names and labels are those of the seed, except for its `ray_serve_` prefix. Shadows count like any request.

Requests are counted in plain numbers and given to prometheus_client a few times a second, since observing three histograms for
each request would cost more than the rest of settling it. A replica's series end with it: the node deletes the files of a process,
and an embedded replica removes its series here.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter as Counts

from prometheus_client import Counter, Gauge, Histogram

from ..broker.envelope import Envelope
from ..broker.latencies import LATENCY_BUCKETS_MS
from ..broker.results import Result
from ..controller.state.config import MAX_REQUEST_TIMEOUT_S
from .takeover import is_kept_for_replay

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
_BACKEND, _REPLICA = ["backend"], ["backend", "replica"]
_REASONS = ("late", "cancelled", "gone", "dead letter")
_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # set by the node: series are in files, and cannot be removed one by one

_requests = Counter("mqserve_backend_request_counter", "Requests answered.", _BACKEND)
_errors = Counter("mqserve_backend_error_counter", "Requests whose handler raised.", _BACKEND)
_dropped = Counter("mqserve_backend_dropped", "Requests not run.", [*_BACKEND, "reason"])
_starts = Counter("mqserve_backend_replica_starts", "Replicas that got ready.", _REPLICA)
_queuing_ms = Histogram("mqserve_backend_queuing_latency_ms", "From sending to the start of the run.", _REPLICA, buckets=LATENCY_BUCKETS_MS)
_processing_ms = Histogram(
    "mqserve_backend_processing_latency_ms", "Run time of the user's code.", [*_REPLICA, "batch_size"], buckets=LATENCY_BUCKETS_MS
)
_batch_size = Histogram("mqserve_backend_batch_size", "Requests in one call.", _REPLICA, buckets=BATCH_BUCKETS)
_queued = Gauge("mqserve_replica_queued_queries", "Requests held that do not run yet.", _REPLICA, multiprocess_mode="livesum")
_processing = Gauge("mqserve_replica_processing_queries", "Requests that run now.", _REPLICA, multiprocess_mode="livesum")
_living: Counts[str] = Counts()  # replicas in this process, by backend: the backend's own series go with the last one


class ReplicaMetrics:
    """The metrics of one replica. Its series exist from `ready` to `end`."""

    def __init__(self, backend: str, replica_id: str) -> None:
        self._labels = (backend, replica_id)
        self._answered = self._failed = 0
        self.dropped: Counts[str] = Counts(dict.fromkeys(_REASONS, 0))  # so that each has a series from the start
        self._queuing = _Gathered(_queuing_ms.labels(*self._labels), LATENCY_BUCKETS_MS)
        self._batch_sizes = _Gathered(_batch_size.labels(*self._labels), BATCH_BUCKETS)
        self._processing: dict[int, _Gathered] = {}

    def __repr__(self) -> str:
        return f"<ReplicaMetrics of {self._labels[1]}>"

    def ready(self) -> None:
        _living[self._labels[0]] += 1
        _starts.labels(*self._labels).inc()

    def done(self, envelope: Envelope, result: Result, now_ms: int, run_s: float, batch_size: int) -> None:
        if result.error is None:
            self._answered += 1
        else:
            self._failed += 1
        if envelope.header.deadline and envelope.expiration_ms:
            timeout_ms = envelope.expiration_ms - (MAX_REQUEST_TIMEOUT_S * 1000 if is_kept_for_replay(envelope) else 0)
            sent_ms = envelope.header.deadline - timeout_ms
            self._queuing.add(max(0.0, now_ms - sent_ms - run_s * 1000))
        processing = self._processing.get(batch_size)
        if processing is None:
            child = _processing_ms.labels(*self._labels, str(batch_size))
            processing = self._processing[batch_size] = _Gathered(child, LATENCY_BUCKETS_MS)
        processing.add(run_s * 1000)
        self._batch_sizes.add(batch_size)

    def hand_over(self, queued: int, processing: int) -> None:
        """Gives prometheus_client the counts since the last call, and the gauges."""
        _requests.labels(self._labels[0]).inc(self._answered)
        _errors.labels(self._labels[0]).inc(self._failed)
        self._answered = self._failed = 0
        for reason, count in self.dropped.items():
            _dropped.labels(self._labels[0], reason).inc(count)
            self.dropped[reason] = 0
        for gathered in (self._queuing, self._batch_sizes, *self._processing.values()):
            gathered.hand_over()
        _queued.labels(*self._labels).set(queued)
        _processing.labels(*self._labels).set(processing)

    def end(self) -> None:
        """Removes the series of this replica. Do not call `hand_over` after it."""
        backend = self._labels[0]
        _living[backend] -= 1
        is_last = not _living[backend]
        if is_last:
            del _living[backend]
        if _FOLDER_VARIABLE in os.environ:
            return
        for metric in (_starts, _queuing_ms, _batch_size, _queued, _processing):
            metric.remove(*self._labels)
        for batch_size in self._processing:
            _processing_ms.remove(*self._labels, str(batch_size))
        if is_last:
            _requests.remove(backend)
            _errors.remove(backend)
            for reason in _REASONS:
                _dropped.remove(backend, reason)


class _Gathered:
    """Observations of one histogram until `hand_over`, which sorts them into buckets. A histogram has no bulk `observe`, so this adds to
    its buckets by private names of prometheus_client, which tests/test_replica_metrics.py checks."""

    def __init__(self, histogram: Histogram, bounds: tuple[int, ...]) -> None:
        self._histogram = histogram
        self._bounds = bounds
        self._values: list[float] = []
        self.add = self._values.append

    def hand_over(self) -> None:
        if self._values:
            self._histogram._sum.inc(sum(self._values))
            for position, count in Counts([bisect_left(self._bounds, value) for value in self._values]).items():
                self._histogram._buckets[position].inc(count)
            self._values.clear()
