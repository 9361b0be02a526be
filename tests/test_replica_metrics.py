"""What a replica counts reaches prometheus_client exactly, although it goes there in bulk."""

from prometheus_client import REGISTRY

from mqserve.broker.envelope import Envelope, Header
from mqserve.broker.results import ErrorInfo, Result
from mqserve.replicas.metrics import ReplicaMetrics


def sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


def test_what_was_counted_is_observed_once_handed_over() -> None:
    metrics = ReplicaMetrics("counted", "counted#1")
    envelope = Envelope("a" * 32, b"", "text/plain", Header(origin="http", deadline=61_000), expiration_ms=60_000)

    metrics.done(envelope, Result(), now_ms=1_030, run_s=0.007, batch_size=1)
    metrics.done(envelope, Result(), now_ms=1_030, run_s=0.003, batch_size=4)
    metrics.done(envelope, Result(status=500, error=ErrorInfo("ValueError", "no")), now_ms=9_000, run_s=7.0, batch_size=1)
    metrics.hand_over(queued=2, processing=1)
    metrics.hand_over(queued=2, processing=1)  # nothing new: nothing is counted twice

    replica = {"backend": "counted", "replica": "counted#1"}
    assert sample("mqserve_backend_request_counter_total", backend="counted") == 2
    assert sample("mqserve_backend_error_counter_total", backend="counted") == 1
    assert sample("mqserve_backend_queuing_latency_ms_count", **replica) == 3
    assert sample("mqserve_backend_queuing_latency_ms_bucket", **replica, le="50.0") == 2
    assert sample("mqserve_backend_processing_latency_ms_bucket", **replica, batch_size="1", le="10.0") == 1
    assert sample("mqserve_backend_processing_latency_ms_bucket", **replica, batch_size="1", le="+Inf") == 2
    assert sample("mqserve_backend_processing_latency_ms_sum", **replica, batch_size="4") == 3.0
    assert sample("mqserve_backend_batch_size_bucket", **replica, le="4.0") == 3
    assert sample("mqserve_replica_queued_queries", **replica) == 2
    assert sample("mqserve_replica_processing_queries", **replica) == 1
