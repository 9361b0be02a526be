"""A handler that takes 5 ms, on two replicas, with at most 100 requests that wait."""

import time

import mqserve as serve


@serve.endpoint("/bounded", num_replicas=2, max_queued_requests=100)
def bounded(request: serve.Request) -> str:
    time.sleep(0.005)
    return "ok"
