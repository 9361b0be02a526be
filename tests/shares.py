"""What replicas have got: their variables, asked from each of them."""

import os
from typing import Any

import mqserve as serve
from tests.instances import wait_until


def show_environment(request: Any) -> dict[str, str | None]:
    import time

    time.sleep(0.01)  # for siblings to get some of the requests
    variables = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return {**{name: os.environ.get(name) for name in variables}, "replica": serve.get_current_replica_tag()}


def shown(client: serve.Client, name: str, replicas: int) -> dict[str, dict[str, str | None]]:
    """What each of the replicas shows, by its tag."""
    found: dict[str, dict[str, str | None]] = {}
    if name not in client.list_endpoints():
        client.create_endpoint(name, backend=name)
    handle = client.get_handle(name)

    def all_of_them() -> bool:
        for answer in serve.get([handle.remote() for _ in range(8 * replicas)], timeout=30):
            found[answer["replica"]] = answer
        return len(found) >= replicas

    wait_until(all_of_them)
    assert len(found) == replicas
    return found
