"""What a proxy counts; names as in the seed, with its `ray_serve_` prefix replaced. Routes are patterns, never raw paths."""

from __future__ import annotations

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest

LATENCY_BUCKETS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

http_requests = Counter("mqserve_num_http_requests", "HTTP requests that matched a route.", ["route"])
http_responses = Counter("mqserve_num_http_responses", "HTTP answers by status.", ["route", "status"])
http_latency_ms = Histogram("mqserve_http_latency_ms", "From the request's arrival to its answer.", ["route"], buckets=LATENCY_BUCKETS_MS)
router_requests = Counter("mqserve_num_router_requests", "Requests sent to an endpoint.", ["endpoint"])
queued_queries = Gauge("mqserve_backend_queued_queries", "Requests of this proxy that have no answer yet.", ["backend", "endpoint"])


def exposition() -> bytes:
    """This process's metrics, in Prometheus's text format."""
    return generate_latest(REGISTRY)
