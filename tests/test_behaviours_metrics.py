"""What Prometheus finds: the seed's names with our prefix, routes as patterns, the users' own metrics beside ours. In both forms."""

import multiprocessing
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import mqserve as serve
from tests.gates import Gate
from tests.instances import SECRET_KEY, CommandLine, Deploy, distributed_only, new_name, new_namespace, started, wait_until

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Pages:
    """The metrics pages of one instance: the proxy's, and the node's, where it has one of its own."""

    def __init__(self, client: serve.Client, node_url: str) -> None:
        self.client = client
        self.proxy_url = f"{client.http_url()}/-/metrics"
        self.node_url = node_url or self.proxy_url

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples with at least these labels, wherever they are."""
        found = [
            value
            for page in {self.proxy_url, self.node_url}
            for (sample, has), value in samples(page).items()
            if sample == name and labels.items() <= dict(has).items()
        ]
        return sum(found)

    def labels(self, name: str, **labels: str) -> set[str]:
        """The names of the labels of such samples."""
        return {
            label
            for page in {self.proxy_url, self.node_url}
            for sample, has in samples(page)
            if sample == name and labels.items() <= dict(has).items()
            for label, _ in has
        }


def samples(page: str) -> Samples:
    response = httpx.get(page).raise_for_status()
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def pages(form: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    urls = {name: str(request.getfixturevalue(name)) for name in ("broker_url", "store_url")} if form == "distributed" else {}
    namespace = new_namespace("metrics")
    with started(**urls, namespace=namespace) as client:
        node_url = ""
        if urls:
            variables = {f"MQSERVE_{name.upper()}": url for name, url in urls.items()}
            variables |= {"MQSERVE_NAMESPACE": namespace, "MQSERVE_SECRET_KEY": SECRET_KEY, "COLUMNS": "300"}
            told = CommandLine(tmp_path_factory.mktemp("status"), **variables).run("status").stdout
            found = re.search(r"http://\S+/metrics", told)
            assert found, told
            node_url = found.group()
        yield Pages(client, node_url)


@pytest.fixture
def deploy_here(pages: Pages) -> Iterator[Deploy]:
    deploy = Deploy(pages.client)
    yield deploy
    deploy.undo()


def at_last(read: Callable[[], float], expected: float) -> None:
    """Counts are handed over a few times a second."""
    wait_until(lambda: read() == expected, told=lambda: f"{read()} rather than {expected}")
    assert read() == expected


def test_a_proxy_counts_requests_by_the_pattern_of_their_route(pages: Pages, deploy_here: Deploy) -> None:
    route = f"/{new_name('r')}"
    pattern = f"{route}/{{user_id:int}}"
    endpoint = deploy_here(lambda request: "ok", route=pattern)
    base = pages.client.http_url()
    for user in range(10):
        assert httpx.get(f"{base}{route}/{user}").status_code == 200
    assert httpx.get(f"{base}{route}/nobody/at/all").status_code == 404
    at_last(lambda: pages.value("mqserve_num_http_requests_total", route=pattern), 10)
    at_last(lambda: pages.value("mqserve_num_router_requests_total", endpoint=endpoint), 10)
    at_last(lambda: pages.value("mqserve_num_http_responses_total", route=pattern, status="200"), 10)
    at_last(lambda: pages.value("mqserve_http_latency_ms_count", route=pattern), 10)
    assert pages.value("mqserve_http_latency_ms_sum", route=pattern) > 0
    text = httpx.get(pages.proxy_url).text
    assert f"{route}/7" not in text and "nobody" not in text, "a raw path is a label, and there are endlessly many"


def test_a_proxy_counts_streamed_answers_by_how_they_ended(pages: Pages, deploy_here: Deploy, gate: Gate) -> None:
    def stream(request: Any) -> Iterator[str]:
        yield "first"
        if request.data == b"fails":
            raise ValueError("on purpose")
        if request.data == b"waits":
            gate.pass_through()
        yield "second"

    route = f"/{new_name('r')}"
    deploy_here(stream, route=route, methods=("POST",))
    url = f"{pages.client.http_url()}{route}"
    assert [httpx.post(url).text for _ in range(3)] == ["firstsecond"] * 3
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(url, content="fails")
    with httpx.stream("POST", url, content="waits") as left:
        next(left.iter_raw())
    for outcome, count in {"complete": 3, "failed": 1, "cancelled": 1}.items():
        at_last(partial(pages.value, "mqserve_num_http_streams_total", route=route, outcome=outcome), count)
    assert pages.value("mqserve_num_http_responses_total", route=route, status="200") == 5
    gate.open()


def test_a_replica_counts_answers_errors_and_time(pages: Pages, deploy_here: Deploy) -> None:
    import time

    def maybe(request: Any) -> str:
        time.sleep(0.012)
        if request.data == "bad":
            raise ValueError("bad")
        return "ok"

    name = deploy_here(maybe)
    handle = pages.client.get_handle(name)
    serve.get([handle.remote("good") for _ in range(6)], timeout=30)
    for _ in range(2):
        with pytest.raises(ValueError):
            handle.remote("bad").result(30)
    at_last(lambda: pages.value("mqserve_backend_request_counter_total", backend=name), 6)
    at_last(lambda: pages.value("mqserve_backend_error_counter_total", backend=name), 2)
    at_last(lambda: pages.value("mqserve_backend_replica_starts_total", backend=name), 1)
    at_last(lambda: pages.value("mqserve_backend_processing_latency_ms_count", backend=name, batch_size="1"), 8)
    at_last(lambda: pages.value("mqserve_backend_queuing_latency_ms_count", backend=name), 8)
    assert 8 * 12 <= pages.value("mqserve_backend_processing_latency_ms_sum", backend=name) < 8 * 1000
    for metric in ("mqserve_replica_queued_queries", "mqserve_replica_processing_queries"):
        assert {"backend", "replica"} <= pages.labels(metric, backend=name)
    assert pages.labels("mqserve_backend_request_counter_total", backend=name) == {"backend"}
    assert {"backend", "replica"} <= pages.labels("mqserve_backend_replica_starts_total", backend=name)
    assert {"backend", "replica", "batch_size", "le"} == pages.labels("mqserve_backend_processing_latency_ms_bucket", backend=name)


def test_the_size_of_batches_is_seen(pages: Pages, deploy_here: Deploy) -> None:
    @serve.accept_batch
    def batch(requests: list[Any]) -> list[None]:
        return [None] * len(requests)

    name = deploy_here(batch, max_batch_size=4, batch_wait_timeout=30)
    serve.get([pages.client.get_handle(name).remote() for _ in range(8)], timeout=30)
    at_last(lambda: pages.value("mqserve_backend_processing_latency_ms_count", backend=name, batch_size="4"), 8)
    at_last(lambda: pages.value("mqserve_backend_batch_size_bucket", backend=name, le="2.0"), 0)
    assert pages.value("mqserve_backend_batch_size_count", backend=name) in (2, 8)


def test_shadow_requests_count_as_any(pages: Pages, deploy_here: Deploy) -> None:
    primary, shadow = deploy_here(lambda request: "primary"), deploy_here(lambda request: "shadow")
    pages.client.shadow_traffic(primary, shadow, 1.0)
    serve.get([pages.client.get_handle(primary).remote() for _ in range(5)], timeout=30)
    at_last(lambda: pages.value("mqserve_backend_request_counter_total", backend=shadow), 5)


def test_what_replicas_hold_is_a_gauge(pages: Pages, deploy_here: Deploy, gate: Gate) -> None:
    async def wait(request: Any) -> None:
        await gate.pass_through_async()

    name = deploy_here(wait)
    refs = [pages.client.get_handle(name).remote() for _ in range(3)]
    at_last(lambda: pages.value("mqserve_replica_processing_queries", backend=name), 3)
    gate.open()
    serve.get(refs, timeout=30)
    at_last(lambda: pages.value("mqserve_replica_processing_queries", backend=name), 0)


def test_a_users_own_metrics_stand_on_the_same_page_with_its_backend_and_replica(pages: Pages, deploy_here: Deploy) -> None:
    metric = new_name("words").replace("-", "_")

    class Counting:
        def __init__(self) -> None:
            from prometheus_client import Counter

            here = serve.get_replica_context()
            self.words = Counter(metric, "Words seen.", ["backend", "replica"]).labels(here.backend_tag, here.replica_tag)

        def __call__(self, request: Any) -> str:
            self.words.inc(len(request.data.split()))
            return serve.get_current_replica_tag()

    name = deploy_here(Counting)
    tag = pages.client.get_handle(name).remote("one two three").result(30)
    at_last(lambda: pages.value(f"{metric}_total", backend=name, replica=tag), 3)


@distributed_only
def test_what_forked_children_count_stays_as_long_as_their_replica_and_their_live_gauges_as_long_as_they(
    pages: Pages, deploy_here: Deploy
) -> None:
    metric = new_name("work").replace("-", "_")

    class Forking:
        def __init__(self) -> None:
            from prometheus_client import Counter, Gauge

            self.counter = Counter(metric, "Work done.")
            self.gauge = Gauge(f"{metric}_live", "Processes at work.", multiprocess_mode="livesum")
            self.counter.inc()

        def work(self) -> None:
            self.counter.inc()
            self.gauge.set(1)

        def __call__(self, request: Any) -> None:
            children = [multiprocessing.get_context("fork").Process(target=self.work) for _ in range(3)]
            for child in children:
                child.start()
            for child in children:
                child.join()

    name = deploy_here(Forking)
    pages.client.get_handle(name).remote().result(30)
    at_last(lambda: pages.value(f"{metric}_total"), 4)
    assert pages.value(f"{metric}_live") == 0
    pages.client.delete_endpoint(name)
    pages.client.delete_backend(name)
    at_last(lambda: pages.value(f"{metric}_total"), 0)
    deploy_here.forget(name)


def test_a_replica_knows_its_backend_and_itself(pages: Pages, deploy_here: Deploy) -> None:
    def who(request: Any) -> list[str]:
        here = serve.get_replica_context()
        assert (here.backend_tag, here.replica_tag) == (serve.get_current_backend_tag(), serve.get_current_replica_tag())
        return [here.backend_tag, here.replica_tag]

    name = deploy_here(who)
    backend, replica = pages.client.get_handle(name).remote().result(30)
    assert backend == name and re.fullmatch(re.escape(name) + "#[0-9a-z]{6}", replica)


@pytest.mark.parametrize("ask", [serve.get_replica_context, serve.get_current_backend_tag, serve.get_current_replica_tag])
def test_outside_a_replica_there_is_no_context(ask: Callable[[], object]) -> None:
    with pytest.raises(serve.InstanceError, match="no replica here"):
        ask()
