"""What a replica counts; names and labels as in the seed, with its `ray_serve_` prefix replaced. Shadows count as any request."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from ..broker.envelope import Envelope
from ..broker.results import Result

LATENCY_BUCKETS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
_BACKEND, _REPLICA = ["backend"], ["backend", "replica"]

_requests = Counter("mqserve_backend_request_counter", "Requests answered.", _BACKEND)
_errors = Counter("mqserve_backend_error_counter", "Requests whose handler raised.", _BACKEND)
_starts = Counter("mqserve_backend_replica_starts", "Replicas that got ready.", _REPLICA)
_queuing_ms = Histogram("mqserve_backend_queuing_latency_ms", "From sending to the start of the run.", _REPLICA, buckets=LATENCY_BUCKETS_MS)
_processing_ms = Histogram(
    "mqserve_backend_processing_latency_ms", "Run time of the user's code.", [*_REPLICA, "batch_size"], buckets=LATENCY_BUCKETS_MS
)
_batch_size = Histogram("mqserve_backend_batch_size", "Requests in one call.", _REPLICA, buckets=_BATCH_BUCKETS)
_queued = Gauge("mqserve_replica_queued_queries", "Requests held that do not run yet.", _REPLICA, multiprocess_mode="livesum")
_processing = Gauge("mqserve_replica_processing_queries", "Requests that run now.", _REPLICA, multiprocess_mode="livesum")


class ReplicaMetrics:
    """The metrics of one replica, their labels bound once."""

    def __init__(self, backend: str, replica_id: str) -> None:
        self._labels = (backend, replica_id)
        self._requests = _requests.labels(backend)
        self._errors = _errors.labels(backend)
        self._queuing_ms = _queuing_ms.labels(*self._labels)
        self._batch_size = _batch_size.labels(*self._labels)
        self._queued = _queued.labels(*self._labels)
        self._processing = _processing.labels(*self._labels)
        self._processing_ms = {1: _processing_ms.labels(*self._labels, "1")}

    def __repr__(self) -> str:
        return f"<ReplicaMetrics of {self._labels[1]}>"

    def ready(self) -> None:
        _starts.labels(*self._labels).inc()

    def done(self, envelope: Envelope, result: Result, now_ms: int, run_s: float, batch_size: int) -> None:
        if result.error is None:
            self._requests.inc()
        else:
            self._errors.inc()
        if envelope.header.deadline and envelope.expiration_ms:
            sent_ms = envelope.header.deadline - envelope.expiration_ms
            self._queuing_ms.observe(max(0.0, now_ms - sent_ms - run_s * 1000))
        if batch_size not in self._processing_ms:
            self._processing_ms[batch_size] = _processing_ms.labels(*self._labels, str(batch_size))
        self._processing_ms[batch_size].observe(run_s * 1000)
        self._batch_size.observe(batch_size)

    def holds(self, queued: int, processing: int) -> None:
        """Sampled now and then, rather than at each request."""
        self._queued.set(queued)
        self._processing.set(processing)
