"""A handler that takes 20 ms, on several numbers of replicas; one that takes them for a whole batch; and one whose queue is bounded."""

import time
from typing import Any

import mqserve as serve


def sleeping(request: serve.Request) -> str:
    time.sleep(0.02)
    return "ok"


for count in (1, 2, 4, 8):
    serve.endpoint(f"/replicas{count}", name=f"replicas{count}", num_replicas=count)(sleeping)


@serve.accept_batch
def batch(requests: list[Any]) -> list[str]:
    time.sleep(0.02)
    return ["ok"] * len(requests)


serve.endpoint("/batches1", name="batches1")(batch)
serve.endpoint("/batches16", name="batches16", max_batch_size=16, batch_wait_timeout=0.005)(batch)
