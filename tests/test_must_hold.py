"""What the second part of the project must hold: roll-outs without a failed request, batches that pay, shadows that cost nothing,
and the snippets of the seed's own pages."""

import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import mqserve as serve
from tests.faults.crowd import paced
from tests.instances import Deploy, distributed_only, new_name, wait_until

RATE = 200


def says(word: str) -> Callable[[Any], str]:
    def say(request: Any) -> str:
        return word

    return say


def test_a_roll_out_under_load_fails_no_request(client: serve.Client, url: str) -> None:
    old, new, endpoint = new_name("old"), new_name("new"), new_name("e")
    client.create_backend(old, says("old"), config={"num_replicas": 2})
    client.create_endpoint(endpoint, backend=old, route=f"/{endpoint}")
    ended, asked = threading.Event(), list[int]()
    with httpx.Client(timeout=60) as http, ThreadPoolExecutor(1) as background:

        def ask() -> tuple[int, str]:
            response = http.get(f"{url}/{endpoint}")
            asked.append(response.status_code)
            return response.status_code, response.text

        def load(count: int) -> None:
            """Until so many more were answered."""
            enough = len(asked) + count
            wait_until(lambda: len(asked) >= enough, told=lambda: f"{len(asked)} of {enough}")

        asking = background.submit(paced, ask, RATE, ended.is_set)
        try:
            client.create_backend(new, says("new"), config={"num_replicas": 2})
            for share in (0.1, 0.5, 1.0):
                client.set_traffic(endpoint, {old: 1 - share, new: share} if share < 1 else {new: 1.0})
                load(RATE)
            client.delete_backend(old)
            load(RATE // 2)
        finally:
            ended.set()
        answers = asking.result()
    assert Counter(status for status, _ in answers) == {200: len(answers)}, Counter(answers)
    assert {text for _, text in answers} == {"old", "new"}
    client.delete_endpoint(endpoint)
    client.delete_backend(new)


def throughput(client: serve.Client, name: str, seconds: float, clients: int = 64) -> float:
    """Requests answered a second, with so many callers who each wait for their answer."""
    handle = client.get_handle(name)
    counts = [0] * clients
    began = time.monotonic()

    def call(number: int) -> None:
        while time.monotonic() - began < seconds:
            handle.remote(number).result(60)
            counts[number] += 1

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(call, range(clients)))
    return sum(counts) / (time.monotonic() - began)


def test_batching_pays_at_least_eightfold(client: serve.Client, deploy: Deploy) -> None:
    @serve.accept_batch
    def costly(requests: list[Any]) -> list[Any]:
        time.sleep(0.02)  # a model's call, whatever the size
        return [request.data for request in requests]

    one, many = deploy(costly), deploy(costly, max_batch_size=16, batch_wait_timeout=0.005)
    throughput(client, many, 0.5)
    ratios: list[float] = []  # the machine's own noise tells on the many small messages
    while len(ratios) < 3 and max(ratios, default=0.0) < 8:
        unbatched, batched = throughput(client, one, 2), throughput(client, many, 2)
        ratios.append(batched / unbatched)
    assert max(ratios) >= 8, f"{ratios}, at last {batched:.0f}/s batched and {unbatched:.0f}/s unbatched"


# Shadows.


class Latencies:
    """Of one endpoint, over HTTP at a modest pace."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(timeout=30)
        self._url = url
        self.seen_s: list[float] = []

    def measure(self, seconds: float, rate: float = 100) -> None:
        began = time.monotonic()

        def ask() -> float:
            started = time.perf_counter()
            self._http.get(self._url).raise_for_status()
            return time.perf_counter() - started

        self.seen_s += paced(ask, rate, lambda: time.monotonic() - began > seconds, threads=2)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.seen_s) * 1000

    @property
    def p99_ms(self) -> float:
        return statistics.quantiles(self.seen_s, n=100)[98] * 1000

    def close(self) -> None:
        self._http.close()


@pytest.fixture(scope="module")
def shadowed(client: serve.Client) -> Iterator[tuple[str, str, str]]:
    """The URLs of a primary alone, and of the same one with a shadow that raises and a shadow that sleeps 5 s."""

    def primary(request: Any) -> str:
        time.sleep(0.005)
        return "primary"

    def fail(request: Any) -> None:
        raise ValueError("a shadow's own trouble")

    def sleep(request: Any) -> None:
        time.sleep(5)

    deploy = Deploy(client)
    name, alone, beside_failing, beside_sleeping = deploy(primary), new_name("alone"), new_name("failing"), new_name("sleeping")
    failing = deploy(fail)
    sleeping = deploy(sleep, max_queued_requests=20, graceful_shutdown_timeout_s=0)
    for endpoint in (alone, beside_failing, beside_sleeping):
        client.create_endpoint(endpoint, backend=name, route=f"/{endpoint}")
    client.shadow_traffic(beside_failing, failing, 1.0)
    client.shadow_traffic(beside_sleeping, sleeping, 1.0)
    yield tuple(f"{deploy.url}/{endpoint}" for endpoint in (alone, beside_failing, beside_sleeping))  # type: ignore[misc]
    for endpoint in (alone, beside_failing, beside_sleeping, failing, sleeping):
        client.delete_endpoint(endpoint)
    for shadow in (failing, sleeping):
        client.delete_backend(shadow, force=True)
    deploy.undo()


@distributed_only
@pytest.mark.parametrize("shadow", [1, 2], ids=["that-always-raises", "that-sleeps-5-s"])
def test_the_primary_is_as_fast_beside_a_shadow(shadowed: tuple[str, str, str], shadow: int) -> None:
    """In alternating rounds. The machine's own noise is as large as the limits at times, so up to three tries."""
    said = []
    for _ in range(3):
        alone, beside = Latencies(shadowed[0]), Latencies(shadowed[shadow])
        for latencies in (alone, beside):
            latencies.measure(0.3)
            latencies.seen_s.clear()
        for _ in range(4):
            alone.measure(0.7)
            beside.measure(0.7)
        alone.close()
        beside.close()
        said.append(
            f"median {alone.median_ms:.2f} ms alone, {beside.median_ms:.2f} beside it; p99 {alone.p99_ms:.2f} and {beside.p99_ms:.2f}"
        )
        median_ms, p99_ms = max(1.1 * alone.median_ms, alone.median_ms + 5), max(1.5 * alone.p99_ms, alone.p99_ms + 50)
        if beside.median_ms <= median_ms and beside.p99_ms <= p99_ms:
            return
    pytest.fail("\n".join(said))


# The seed's own snippets: section by section of its "Advanced Topics" page, unchanged but for the import.

SNIPPETS = {
    "scaling out": """
client.create_backend("b", f, config={"num_replicas": 3})
client.update_backend_config("b", {"num_replicas": 2})
""",
    "resources, by the seed's name for them": """
client.create_backend("gpu", Model, ray_actor_options={"num_cpus": 0.5})
client.create_backend("shared", Model, ray_actor_options={"num_cpus": 0.5})
""",
    "OMP_NUM_THREADS": """
class B:
    def __init__(self, n): os.environ["OMP_NUM_THREADS"] = str(n)
    def __call__(self, request): return os.environ["OMP_NUM_THREADS"]
client.create_backend("par", B, 12)
client.create_endpoint("par", backend="par", route="/par")
assert requests.get(base + "/par").text == "12"
""",
    "batching": """
class B:
    @serve.accept_batch
    def __call__(self, requests): return [work(r) for r in requests]
client.create_backend("b", B, config={"max_batch_size": 5, "batch_wait_timeout": 0.1})
client.create_endpoint("e", backend="b", route="/e")
assert serve.get([client.get_handle("e").remote(n) for n in range(7)]) == [n * 2 for n in range(7)]
""",
    "splitting traffic": """
client.create_backend("b1", f)
client.create_backend("b2", f)
client.create_endpoint("e", backend="b1", route="/e"); client.set_traffic("e", {"b1": 0.5, "b2": 0.5})
client.set_traffic("e", {"b1": 0.99, "b2": 0.01})
client.set_traffic("e", {"b2": 1.0})
assert requests.get(base + "/e").status_code == 200
""",
    "session affinity": """
client.create_backend("b1", f)
client.create_endpoint("e", backend="b1", route="/e")
sid, x, url = "my-session", 1, base + "/e"
requests.get(url, headers={"X-SERVE-SHARD-KEY": sid}); client.get_handle("e").options(shard_key=sid).remote(x)
""",
    "shadow testing": """
for name in ("old", "new1", "new2"): client.create_backend(name, f)
client.create_endpoint("e", backend="old", route="/e")
client.shadow_traffic("e", "new1", 0.5); client.shadow_traffic("e", "new2", 0.1); client.shadow_traffic("e", "new1", 0)
assert requests.get(base + "/e").status_code == 200
""",
    "composing models": """
def m1(request): return 0.7
def m2(request): return "detailed"
for name, model in (("m1", m1), ("m2", m2)):
    client.create_backend(name, model)
    client.create_endpoint(name, backend=name)
class Composed:
    def __init__(self):
        c = serve.connect(); self.m1, self.m2 = c.get_handle("m1"), c.get_handle("m2")
    async def __call__(self, request):
        data = await request.body()
        score = await self.m1.remote(data=data)
        return {"score": score, "r": await self.m2.remote(data=data) if score > .5 else None}
client.create_backend("c", Composed, config={"max_concurrent_queries": 10})
client.create_endpoint("c", backend="c", route="/c", methods=["POST"])
assert requests.post(base + "/c", content=b"image").json() == {"score": 0.7, "r": "detailed"}
""",
    "reconfiguring backends": """
class T:
    def reconfigure(self, cfg): self.threshold = cfg["threshold"]
    def __call__(self, request): return self.threshold
client.create_backend("t", T, config=BackendConfig(user_config={"threshold": 0.01}))
client.create_endpoint("t", backend="t", route="/t")
assert requests.get(base + "/t").json() == 0.01
client.update_backend_config("t", BackendConfig(user_config={"threshold": 0.99}))
assert requests.get(base + "/t").json() == 0.99
""",
    "sync and async handles": """
client.create_backend("b", f)
client.create_endpoint("e", backend="b")
x = 3
assert serve.get(client.get_handle("e").remote(x)) == "f"
async def ask():
    h = client.get_handle("e", sync=False); ref = await h.remote(x); out = await ref
    return out
assert asyncio.run(ask()) == "f"
""",
    "variable routes": """
def user(request): return [request.path_params["user_id"], request.path_params["x"]]
client.create_backend("u", user)
client.create_endpoint("u", backend="u", route="/api/{user_id:int}/{x:float}")
assert requests.get(base + "/api/7/1.5").json() == [7, 1.5]
""",
    "module-level functions": """
serve.create_backend("b", f)
serve.create_endpoint("e", backend="b", route="/e", methods=["GET", "POST"])
assert requests.get(base + "/e").text == "f"
serve.update_backend_config("b", {"num_replicas": 2})
serve.set_traffic("e", {"b": 1.0})
assert serve.get(serve.get_handle("e").remote()) == "f"
serve.delete_endpoint("e")
serve.delete_backend("b")
assert "b" not in serve.list_backends() and "e" not in serve.list_endpoints()
""",
}


@pytest.mark.parametrize("section", SNIPPETS)
def test_a_snippet_of_the_seed_runs_unchanged_but_for_its_import(client: serve.Client, section: str) -> None:
    import asyncio
    import os

    def f(request: Any) -> str:
        return "f"

    def work(request: Any) -> Any:
        return request.data * 2

    class Model:
        def __call__(self, request: Any) -> str:
            return "model"

    known = {"__name__": "__main__", "serve": serve, "client": client, "requests": httpx, "base": client.http_url(), "f": f}
    known |= {"work": work, "Model": Model, "os": os, "asyncio": asyncio, "BackendConfig": serve.BackendConfig}
    backends, endpoints = set(client.list_backends()), set(client.list_endpoints())
    try:
        exec(SNIPPETS[section], known)
    finally:
        for name in set(client.list_endpoints()) - endpoints:
            client.delete_endpoint(name)
        for name in set(client.list_backends()) - backends:
            client.delete_backend(name)
    wait_until(lambda: set(client.list_backends()) == backends)
