"""The metrics of a proxy. The names are those of Ray Serve 1.x without the prefix `ray_serve_`. Route labels are patterns, never raw
paths.

Counts are plain numbers until they are scraped: prometheus_client's own objects take a lock for each, which adds up to an eighth of a
request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ..broker.latencies import LATENCY_BUCKETS_MS
from ..controller.state.documents import Desired
from .streaming import FlowEnd

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


class RouteCounts:
    """The counts of one route; they survive changes of the route table."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.streams: Counter[FlowEnd] = Counter()
        self.latencies = [0] * (len(LATENCY_BUCKETS_MS) + 1)
        self.latency_sum_ms = 0.0

    def answered(self, status: int, latency_ms: float) -> None:
        self.statuses[status] += 1
        self.latencies[bisect_left(LATENCY_BUCKETS_MS, latency_ms)] += 1
        self.latency_sum_ms += latency_ms

    def add(self, other: RouteCounts) -> None:
        self.statuses.update(other.statuses)
        self.streams.update(other.streams)
        self.latencies = [mine + theirs for mine, theirs in zip(self.latencies, other.latencies, strict=True)]
        self.latency_sum_ms += other.latency_sum_ms


class ProxyMetrics:
    """The counts of one proxy. Implements prometheus_client's `Collector`."""

    def __init__(self) -> None:
        self.routes: dict[str, RouteCounts] = {}
        self.sent: Counter[str] = Counter()  # by endpoint
        self.waiting: Counter[tuple[str, str]] = Counter()  # by (backend, endpoint)
        self._desired: Desired | None = None  # the last document followed

    def __repr__(self) -> str:
        return f"<ProxyMetrics of {len(self.routes)} routes>"

    def route(self, pattern: str) -> RouteCounts:
        counts = self.routes.get(pattern)
        if counts is None:
            counts = self.routes[pattern] = RouteCounts()
        return counts

    def keep(self, desired: Desired) -> None:
        """Forgets routes, endpoints and backends that the document no longer has, once their last request is answered."""
        self._desired = desired
        self._forget_deleted()

    def _forget_deleted(self) -> None:
        """Drops the counts of deleted routes. Called before each scrape, too: a request that outlived its route has added a count since."""
        if self._desired is None:
            return
        endpoints = self._desired.endpoints
        routes = {endpoint.route for endpoint in endpoints.values()}
        self.routes = {pattern: counts for pattern, counts in self.routes.items() if pattern in routes}
        for name in self.sent.keys() - endpoints.keys():
            del self.sent[name]
        for backend, name in list(self.waiting):
            is_known = name in endpoints and backend in endpoints[name].traffic
            if not is_known and not self.waiting[backend, name]:
                del self.waiting[backend, name]

    def add(self, other: ProxyMetrics) -> None:
        """Adds the other's counts, and not the gauge of what waits."""
        for pattern, counts in other.routes.items():
            self.route(pattern).add(counts)
        self.sent.update(other.sent)

    def forget_counts(self) -> None:
        """Begins to count anew; what waits still does."""
        self.routes, self.sent = {}, Counter()

    async def exposition(self) -> bytes:
        """Returns these metrics and all others of the process (the embedded form's replicas, the user's own) in Prometheus's text
        format."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry) + generate_latest(REGISTRY)

    def collect(self) -> Iterator[Metric]:
        self._forget_deleted()
        requests = CounterMetricFamily("mqserve_num_http_requests", "HTTP requests that matched a route.", labels=["route"])
        responses = CounterMetricFamily("mqserve_num_http_responses", "HTTP answers by status.", labels=["route", "status"])
        streams = CounterMetricFamily("mqserve_num_http_streams", "Streamed HTTP answers that ended, by how.", labels=["route", "outcome"])
        latency = HistogramMetricFamily("mqserve_http_latency_ms", "From a request's arrival to its answer.", labels=["route"])
        for pattern, counts in self.routes.items():
            requests.add_metric([pattern], counts.statuses.total())
            for status, count in counts.statuses.items():
                responses.add_metric([pattern, str(status)], count)
            for ended, count in counts.streams.items():
                streams.add_metric([pattern, ended], count)
            latency.add_metric([pattern], _cumulative(counts.latencies), counts.latency_sum_ms)
        sent = CounterMetricFamily("mqserve_num_router_requests", "Requests sent to an endpoint.", labels=["endpoint"])
        for endpoint, count in self.sent.items():
            sent.add_metric([endpoint], count)
        waiting = GaugeMetricFamily(
            "mqserve_backend_queued_queries", "HTTP requests that have no answer yet.", labels=["backend", "endpoint"]
        )
        for labels, count in self.waiting.items():
            waiting.add_metric(labels, count)
        yield from (requests, responses, streams, latency, sent, waiting)


def _cumulative(counts: list[int]) -> list[tuple[str, float]]:
    """Prometheus's buckets are cumulative: each counts the lower ones too."""
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip([*map(str, map(float, LATENCY_BUCKETS_MS)), "+Inf"], counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets
