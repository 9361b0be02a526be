"""Python callers: composing backends, futures as arguments, options, pickling, waiting for an endpoint; in both forms."""

import asyncio
import pickle
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, new_name, wait_until


def double(request: Any) -> Any:
    return request.data * 2


def echo(request: Any) -> Any:
    """What a web request has, however it came."""
    return {
        "method": request.method,
        "color": request.headers.get("x-color"),
        "call": request.headers.get("x-serve-call-method"),
        "shard": request.headers.get("x-serve-shard-key"),
        "data": request.data,
        "query": dict(request.query_params),
    }


# Composition.


def test_a_backend_holds_handles_and_calls_other_endpoints(client: serve.Client, deploy: Deploy, url: str) -> None:
    first, second = deploy(double), deploy(lambda request: request.data + 1)

    class Composed:
        def __init__(self, first: str, second: str) -> None:
            client = serve.connect()
            self.first, self.second = client.get_handle(first, sync=False), client.get_handle(second, sync=False)

        async def __call__(self, request: serve.Request) -> dict[str, Any]:
            score = await (await self.first.remote(request.data))
            return {"score": score, "more": await (await self.second.remote(score)) if score > 10 else None}

    composed = deploy.at(Composed, first, second, max_concurrent_queries=10)
    assert httpx.post(composed, json=7, timeout=30).json() == {"score": 14, "more": 15}
    assert httpx.post(composed, json=2, timeout=30).json() == {"score": 4, "more": None}


def test_a_plain_backend_calls_others_through_a_handle_it_was_constructed_with(client: serve.Client, deploy: Deploy) -> None:
    class Ensemble:
        def __init__(self, *members: serve.Handle) -> None:
            self.members = members

        def __call__(self, request: Any) -> int:
            return sum(serve.get([member.remote(request.data) for member in self.members], timeout=30))

    members = [client.get_handle(deploy(double)), client.get_handle(deploy(lambda request: request.data + 1))]
    assert client.get_handle(deploy(Ensemble, *members)).remote(5).result(30) == 16


def test_several_calls_of_one_replica_are_in_flight_at_once(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def slow(request: Any) -> Any:
        await gate.pass_through_async()
        return request.data

    async def fan_out(request: Any) -> list[Any]:
        handle = serve.get_handle(request.data, sync=False)
        refs = [await handle.remote(number) for number in range(5)]
        return list(await asyncio.gather(*refs))

    ref = client.get_handle(deploy(fan_out)).remote(deploy(slow))
    wait_until(lambda: gate.came == 5)
    gate.open()
    assert ref.result(30) == [0, 1, 2, 3, 4]


def test_an_error_passes_through_a_composition(client: serve.Client, deploy: Deploy) -> None:
    def fail(request: Any) -> None:
        raise LookupError("deep down")

    async def outer(request: Any) -> Any:
        return await (await serve.get_handle(request.data, sync=False).remote())

    with pytest.raises(LookupError, match="deep down"):
        client.get_handle(deploy(outer)).remote(deploy(fail)).result(30)


def test_arrays_pass_between_backends_and_become_json_over_http(client: serve.Client, deploy: Deploy) -> None:
    total = deploy(lambda request: request.data.sum())

    async def outer(request: Any) -> Any:
        return {"result": await (await serve.get_handle(total, sync=False).remote(np.full((10, 10), 1.0)))}

    assert httpx.get(deploy.at(outer), timeout=30).json() == {"result": 100.0}


def test_connect_in_a_replica_reaches_its_own_instance_and_can_deploy_there(client: serve.Client, deploy: Deploy) -> None:
    def deploy_another(request: Any) -> list[str]:
        own = serve.connect()
        own.create_backend(request.data, lambda request: "made in a replica")
        own.create_endpoint(request.data, backend=request.data)
        return sorted(own.list_endpoints())

    name = new_name("b")
    deploying = deploy(deploy_another)
    assert {name, deploying} <= set(client.get_handle(deploying).remote(name).result(60))
    assert client.get_handle(name).remote().result(30) == "made in a replica"
    client.delete_endpoint(name)
    client.delete_backend(name)


# Futures as arguments.


def test_a_pending_future_as_an_argument_delays_the_callee_until_it_resolves(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate, called = Gate(tmp_path), Gate(tmp_path)

    def slow(request: Any) -> int:
        gate.pass_through()
        return 20

    def add(request: Any) -> int:
        called.open()
        called.pass_through()
        return int(request.data) + int(request.query_params["more"])

    name_of_slow, name_of_add = deploy(slow, sync_threads=2), deploy(add)
    slow_handle, handle = client.get_handle(name_of_slow), client.get_handle(name_of_add)
    ref = handle.remote(slow_handle.remote(), more=slow_handle.remote())
    wait_until(lambda: gate.came == 2)
    assert called.came == 0 and not ref.done()
    gate.open()
    assert ref.result(30) == 40


def test_the_error_of_a_future_as_an_argument_is_the_calls(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    called = Gate(tmp_path)
    called.open()

    def fail(request: Any) -> None:
        raise LookupError("no such digit")

    failing = client.get_handle(deploy(fail)).remote()
    with pytest.raises(LookupError, match="no such digit"):
        client.get_handle(deploy(lambda request: called.pass_through())).remote(failing).result(30)
    assert called.came == 0


def test_futures_chain(client: serve.Client, deploy: Deploy) -> None:
    handle = client.get_handle(deploy(double))
    assert handle.remote(handle.remote(handle.remote(1))).result(30) == 8


# What the handler sees.


def test_a_request_looks_the_same_by_http_and_by_handle(client: serve.Client, deploy: Deploy) -> None:
    name = new_name("r")
    backend = deploy(echo, route=f"/{name}")
    headers = {"X-Color": "blue", "X-SERVE-SHARD-KEY": "me"}
    by_http = httpx.post(f"{deploy.url}/{name}?a=1", json={"n": [1, 2]}, headers=headers).json()
    handle = client.get_handle(backend).options(http_method="POST", http_headers={"X-Color": "blue"}, shard_key="me")
    assert handle.remote({"n": [1, 2]}, a="1").result(30) == by_http
    assert by_http == {"method": "POST", "color": "blue", "call": None, "shard": "me", "data": {"n": [1, 2]}, "query": {"a": "1"}}


def test_body_json_and_form_of_a_handles_request(client: serve.Client, deploy: Deploy) -> None:
    async def read(request: serve.ServeRequest) -> list[Any]:
        return [await request.body(), await request.json(), await request.form()]

    handle = client.get_handle(deploy(read))
    assert handle.remote({"a": 1}).result(30) == [{"a": 1}] * 3
    with pytest.raises(serve.MQServeError, match="dict"):
        handle.remote(7).result(30)


def test_a_headless_endpoint_is_reached_by_handle_with_keyword_arguments(client: serve.Client, deploy: Deploy) -> None:
    name = deploy(lambda request: request.query_params["i"])
    assert client.get_handle(name).remote(i=7).result(30) == 7
    assert client.list_endpoints()[name]["route"] is None


def test_keyword_arguments_keep_their_types_and_lists_have_getlist(client: serve.Client, deploy: Deploy) -> None:
    handle = client.get_handle(deploy(lambda request: [request.query_params["x"], request.query_params.getlist("many")]))
    assert handle.remote(x={"deep": 1.5}, many=["a", "b"]).result(30) == [{"deep": 1.5}, ["a", "b"]]


# Methods.


class Methods:
    def __call__(self, request: Any) -> str:
        return "called"

    def a(self, request: Any) -> str:
        return f"a {request.data}"

    async def b(self, request: Any) -> str:
        return f"b {request.data}"

    def _hidden(self, request: Any) -> str:
        return "told"


def test_methods_are_called_by_option_and_a_missing_one_is_an_error(client: serve.Client, deploy: Deploy) -> None:
    handle = client.get_handle(deploy(Methods))
    assert handle.options(method_name="a").remote(1).result(30) == "a 1"
    assert handle.options(method_name="b").remote(2).result(30) == "b 2"
    assert handle.options(method_name="__call__").remote().result(30) == "called"
    for method in ("missing", "_hidden", "__init__", "reconfigure"):
        with pytest.raises(serve.MQServeError, match="no method"):
            handle.options(method_name=method).remote().result(30)


# Options.


def test_later_options_override_and_every_handle_stays_as_it_was(client: serve.Client, deploy: Deploy) -> None:
    name = deploy(Methods)
    clean = client.get_handle(name)
    of_a = clean.options(method_name="a", shard_key="k")
    of_b = of_a.options(method_name="b")
    assert of_b.remote(1).result(30) == "b 1"
    assert of_a.remote(1).result(30) == "a 1"
    assert clean.remote().result(30) == "called"
    assert client.get_handle(name).remote().result(30) == "called"


def test_an_unknown_option_is_a_type_error_that_names_the_known(client: serve.Client, deploy: Deploy) -> None:
    with pytest.raises(TypeError, match="method_name"):
        client.get_handle(deploy(double)).options(method="a")


def test_a_handle_tells_its_endpoint(client: serve.Client, deploy: Deploy) -> None:
    name = deploy(double)
    assert repr(client.get_handle(name)) == f"Handle(endpoint={name!r})"
    assert repr(client.get_handle(name, sync=False)) == f"AsyncHandle(endpoint={name!r})"


# Sync and async.


def test_an_async_handle_works_in_a_callers_own_loop(client: serve.Client, deploy: Deploy) -> None:
    handle = client.get_handle(deploy(double), sync=False)

    async def main() -> list[int]:
        refs = [await handle.remote(number) for number in range(10)]
        return list(await asyncio.gather(*refs))

    assert asyncio.run(main()) == [number * 2 for number in range(10)]


def test_a_sync_handles_future_can_be_awaited(client: serve.Client, deploy: Deploy) -> None:
    handle = client.get_handle(deploy(double))

    async def main() -> int:
        return int(await handle.remote(4))

    assert asyncio.run(main()) == 8


def test_a_sync_handle_may_be_used_from_any_thread(client: serve.Client, deploy: Deploy) -> None:
    handle = client.get_handle(deploy(double))
    results: list[int] = []
    threads = [threading.Thread(target=lambda number=number: results.append(handle.remote(number).result(30))) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [number * 2 for number in range(8)]


def test_wait_tells_the_done_from_the_others(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def maybe(request: Any) -> Any:
        if request.data == "slow":
            gate.pass_through()
        return request.data

    handle = client.get_handle(deploy(maybe, sync_threads=2))
    slow, fast = handle.remote("slow"), handle.remote("fast")
    assert serve.wait([slow, fast], timeout=30) == ([fast], [slow])
    assert serve.wait([slow, fast], num_returns=2, timeout=0.1) == ([fast], [slow])
    with pytest.raises(TimeoutError):
        serve.get(slow, timeout=0.1)
    gate.open()
    assert serve.wait([slow, fast], num_returns=2, timeout=30) == ([slow, fast], [])


# Pickling.


def test_a_pickled_handle_keeps_its_endpoint_and_options(client: serve.Client, deploy: Deploy) -> None:
    handle = client.get_handle(deploy(Methods)).options(method_name="a")
    again = pickle.loads(pickle.dumps(handle))
    assert repr(again) == repr(handle)


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "async"])
def test_a_handle_may_be_sent_to_a_replica(client: serve.Client, deploy: Deploy, sync: bool) -> None:
    async def use(request: Any) -> Any:
        ref = request.data.remote(21)
        return await (await ref if not isinstance(ref, serve.Future) else ref)

    handle = client.get_handle(deploy(double), sync=sync)  # type: ignore[call-overload]
    assert client.get_handle(deploy(use)).remote(handle).result(60) == 42


def test_a_client_may_be_sent_to_a_replica(client: serve.Client, deploy: Deploy) -> None:
    name = deploy(lambda request: sorted(request.data.list_endpoints()))
    assert name in client.get_handle(name).remote(client).result(60)


# Endpoints that are not there.


def test_an_unknown_endpoint_is_a_key_error_with_the_seeds_sentence(client: serve.Client) -> None:
    with pytest.raises(KeyError) as caught:
        client.get_handle("nowhere")
    assert str(caught.value) == "Endpoint 'nowhere' does not exist."


def test_a_handle_that_may_miss_its_endpoint_waits_for_it(client: serve.Client, deploy: Deploy) -> None:
    backend, endpoint = deploy(double), new_name("e")
    handle = client.get_handle(endpoint, missing_ok=True)
    ref = handle.remote(4)
    with pytest.raises(TimeoutError):
        ref.result(0.3)
    client.create_endpoint(endpoint, backend=backend)
    assert ref.result(30) == 8
    assert handle.remote(5).result(30) == 10
    client.delete_endpoint(endpoint)


def test_a_handle_whose_endpoint_was_deleted_says_so(client: serve.Client, deploy: Deploy) -> None:
    backend, endpoint = deploy(double), new_name("e")
    client.create_endpoint(endpoint, backend=backend)
    handle = client.get_handle(endpoint)
    assert handle.remote(1).result(30) == 2
    client.delete_endpoint(endpoint)
    with pytest.raises(KeyError, match=endpoint):
        handle.remote(1).result(30)
