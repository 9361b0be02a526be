"""How latencies are measured, by proxies and replicas alike."""

from __future__ import annotations

LATENCY_BUCKETS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_WEIGHT = 0.1


def moving_average(average: float, sample: float) -> float:
    """The average with one more sample; 0 where there was none yet."""
    return sample if average == 0 else average + _WEIGHT * (sample - average)
