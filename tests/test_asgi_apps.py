"""An ASGI app is a backend as it is: FastAPI, Starlette, Litestar and plain ones, in both forms."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from fastapi.testclient import TestClient

import mqserve as serve
from mqserve.replicas.asgi_apps import is_asgi_app, makes_asgi_apps
from tests import apps
from tests.gates import Gate
from tests.instances import Deploy, distributed_only, new_name, wait_until
from tests.tallies import Tally

FRAMEWORKS = {
    "fastapi": apps.shop,
    "starlette": apps.starlette_app,
    "litestar": apps.litestar_app,
    "function": apps.plain_app,
    "object": apps.answering,
}


class Mount:
    """Mounts apps for one test; returns the URL of their prefix."""

    def __init__(self, client: serve.Client) -> None:
        self._client = client
        self._names: list[str] = []

    def __call__(self, app: Any, *args: Any, **options: Any) -> str:
        name = new_name("app")
        self._client.mount(f"/{name}", app, *args, **options)
        self._names.append(name)
        return f"{self._client.http_url()}/{name}"

    def undo(self) -> None:
        for name in self._names:
            self._client.delete_endpoint(name)
            self._client.delete_backend(name)


@pytest.fixture
def mount(client: serve.Client) -> Iterator[Mount]:
    mount = Mount(client)
    yield mount
    mount.undo()


@pytest.fixture(scope="module")
def shop(client: serve.Client) -> Iterator[str]:
    """The URL of the FastAPI app, which most tests of the module ask."""
    client.mount("/shop", apps.shop)
    yield f"{client.http_url()}/shop"
    client.delete_endpoint("shop")
    client.delete_backend("shop")


# Frameworks.


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_app_of_any_framework_answers_under_its_prefix(mount: Mount, framework: str) -> None:
    url = mount(FRAMEWORKS[framework])
    prefix = "/" + url.rpartition("/")[2]
    assert httpx.get(f"{url}/hello/ada" if framework != "fastapi" else f"{url}/items/3").json() in (
        {"hello": "ada"},
        {"item_id": 3, "wanted": 1},
    )
    answer = httpx.post(f"{url}/where/a%2Fb/%C3%A9?x=1&x=%20", content=b"body").json()
    assert (answer["method"], answer["root_path"], answer["query"]) == ("POST", prefix, "x=1&x=%20")
    assert answer["raw_path"] == f"{prefix}/where/a%2Fb/%C3%A9"
    assert answer["path"] == ("" if framework == "litestar" else prefix) + "/where/a/b/é"  # Litestar takes the prefix away itself


@pytest.mark.parametrize("target", [apps.shop, apps.starlette_app, apps.litestar_app, apps.plain_app, apps.answering, apps.Multiplier()])
def test_an_app_is_told_from_a_handler(target: Any) -> None:
    assert is_asgi_app(target)


def test_no_handler_is_taken_for_an_app() -> None:
    async def two_defaults(request: Any, more: int = 0, again: int = 0) -> None: ...

    class Handler:
        async def __call__(self, request: Any) -> None: ...

    for target in (lambda request: 1, two_defaults, Handler(), print, dict, FastAPI, apps.Multiplier, "app", None):
        assert not is_asgi_app(target), target
    assert makes_asgi_apps(apps.Multiplier) and makes_asgi_apps(FastAPI) and not makes_asgi_apps(Handler)


# FastAPI.


def test_typed_parameters_are_converted_or_refused_by_the_app(shop: str) -> None:
    assert httpx.get(f"{shop}/items/3?wanted=2").json() == {"item_id": 3, "wanted": 2}
    refused = httpx.get(f"{shop}/items/three")
    assert refused.status_code == 422 and refused.json()["detail"][0]["loc"] == ["path", "item_id"]


def test_the_docs_page_and_the_schema_lead_through_the_proxy(shop: str) -> None:
    assert "/shop/openapi.json" in httpx.get(f"{shop}/docs").text
    schema = httpx.get(f"{shop}/openapi.json").json()
    assert schema["servers"] == [{"url": "/shop"}] and "/items/{item_id}" in schema["paths"]


def test_uploads_arrive_whole(shop: str) -> None:
    large = b"x" * 3_000_000
    sent = httpx.post(f"{shop}/files", files=[("files", ("a.txt", b"abc")), ("files", ("b.bin", large))], data={"note": "two"})
    assert sent.json() == {"note": "two", "sizes": {"a.txt": 3, "b.bin": len(large)}}


def test_several_cookies_of_one_answer_come_back_with_the_next_request(shop: str) -> None:
    with httpx.Client() as browser:
        first = browser.get(f"{shop}/login")
        assert [cookie.partition(";")[0] for cookie in first.headers.get_list("set-cookie")] == ["user=ada", "theme=dark"]
        assert browser.get(f"{shop}/login").json() == {"user": "ada", "theme": "dark"}


def test_dependencies_and_background_tasks_run(shop: str, tmp_path: Path) -> None:
    assert httpx.get(f"{shop}/dependency").json() == "connection of nobody"
    tally = Tally(tmp_path)
    assert httpx.get(f"{shop}/later", params={"tally": str(tally.path)}).json() == "answered"
    wait_until(lambda: tally.lines == ["after the answer"])


def test_each_request_has_a_context_of_its_own(shop: str) -> None:
    assert {httpx.get(f"{shop}/context?caller=ada").json() for _ in range(3)} == {"nobody"}


def test_each_request_gets_a_copy_of_the_state_that_the_lifespan_has_set(shop: str) -> None:
    for _ in range(2):
        answer = httpx.get(f"{shop}/state").json()
        assert answer == {"model": "loaded!", "own_loop": True, "url": f"{shop}/items/7"}


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_every_method_goes_to_the_app(shop: str, method: str) -> None:
    assert httpx.request(method, f"{shop}/where/x").json()["method"] == method


def test_the_app_decides_what_it_answers_to_other_methods(shop: str) -> None:
    refused = httpx.post(f"{shop}/page")
    assert (refused.status_code, refused.headers["allow"], refused.json()) == (405, "GET", {"detail": "Method Not Allowed"})


def test_head_gets_the_head_of_an_answer(mount: Mount) -> None:
    got = httpx.head(f"{mount(apps.starlette_app)}/hello/ada")
    assert (got.status_code, got.headers["content-length"], got.content) == (200, "15", b"")


def test_an_exception_is_the_apps_own_500_and_logged_once(shop: str, form: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        failed = httpx.get(f"{shop}/broken")
        assert (failed.status_code, failed.text) == (500, "Internal Server Error")
        assert httpx.get(f"{shop}/items/1").status_code == 200
    if form == "embedded":
        told = wait_until(lambda: [record.getMessage() for record in caplog.records if "no such thing" in record.getMessage()])
        assert len(told) == 1 and "LookupError" in told[0]


def test_an_app_that_answers_nothing_is_a_500(mount: Mount) -> None:
    failed = httpx.get(f"{mount(apps.silent)}/x")
    assert failed.status_code == 500 and "mqserve.BadType" in failed.json()["detail"]


# Concurrency.


def test_a_plain_endpoint_runs_in_a_thread_and_holds_up_no_other(mount: Mount, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    url = mount(apps.behind, gate, factory=True)
    with ThreadPoolExecutor() as threads:
        waiting = [threads.submit(httpx.get, f"{url}/{kind}") for kind in ("plain", "async", "plain", "async")]
        wait_until(lambda: gate.came == 4)
        assert httpx.get(f"{url}/free").json() == "free"
        gate.open()
        assert sorted(one.result().json() for one in waiting) == ["async", "async", "plain", "plain"]


def test_plain_endpoints_share_threads_that_know_their_replica(shop: str) -> None:
    seen = [httpx.get(f"{shop}/thread").json() for _ in range(20)]
    assert len({one["ident"] for one in seen}) == 1, "a thread for each request"
    assert {one["tag"] for one in seen} == {"shop"}


def test_max_concurrent_queries_limits_the_requests_that_run_at_once(mount: Mount, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    url = mount(apps.behind, gate, factory=True, config={"max_concurrent_queries": 2})
    with ThreadPoolExecutor() as threads:
        waiting = [threads.submit(httpx.get, f"{url}/async") for _ in range(5)]
        wait_until(lambda: gate.came == 2)
        assert httpx.get(f"{url}/free", headers={"x-request-timeout-seconds": "0.5"}).status_code == 504
        assert gate.came == 2
        gate.open()
        assert [one.result().json() for one in waiting] == ["async"] * 5


def test_a_request_past_its_deadline_is_cancelled_in_the_app(mount: Mount, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    url = mount(apps.behind, gate, factory=True, config={"max_concurrent_queries": 1, "request_timeout_s": 0.5})
    assert httpx.get(f"{url}/async").status_code == 504
    assert httpx.get(f"{url}/free", headers={"x-request-timeout-seconds": "0.4"}).status_code in (200, 504)
    wait_until(lambda: httpx.get(f"{url}/free").status_code == 200)


def test_a_client_that_leaves_ends_its_request_in_the_app(client: serve.Client, mount: Mount, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    url = mount(apps.noting_its_end, tally, factory=True)
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{url}/", timeout=httpx.Timeout(30, read=0.5))
    wait_until(lambda: tally.lines == ["begins", "CancelledError"], told=lambda: tally.lines)


# The lifespan.


def test_the_lifespan_starts_before_the_first_request_and_ends_after_the_last_one(client: serve.Client, tmp_path: Path) -> None:
    tally, name = Tally(tmp_path), new_name("app")
    client.mount(f"/{name}", apps.telling, tally, factory=True)
    assert tally.lines == ["startup"]
    assert httpx.get(f"{client.http_url()}/{name}/hello").json() == "hello"
    client.delete_endpoint(name)
    client.delete_backend(name)
    wait_until(lambda: tally.lines == ["startup", "request", "shutdown"], told=lambda: tally.lines)


def test_requests_under_way_end_before_the_shutdown_of_the_app(client: serve.Client, tmp_path: Path) -> None:
    tally, name = Tally(tmp_path), new_name("app")
    gate = Gate(tmp_path)
    client.mount(f"/{name}", lingering, gate, tally, factory=True)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(httpx.get, f"{client.http_url()}/{name}")
        wait_until(lambda: gate.came == 1)
        client.delete_endpoint(name)
        deleted = threads.submit(client.delete_backend, name)
        gate.open()
        assert asked.result().text == "done"
        deleted.result()
    wait_until(lambda: tally.lines == ["request", "shutdown"], told=lambda: tally.lines)


def lingering(gate: Gate, tally: Tally) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            tally.note("shutdown")
            await send({"type": "lifespan.shutdown.complete"})
            return
        await gate.pass_through_async()
        tally.note("request")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    return app


@pytest.mark.parametrize(("fails", "says"), [("startup", "ValueError: the model is not there"), ("exit", "the app gives up")])
def test_a_startup_that_fails_is_the_replicas_reason(client: serve.Client, tmp_path: Path, fails: str, says: str) -> None:
    with pytest.raises(serve.BackendFailed, match=says) as raised:
        client.mount("/failing", apps.telling, Tally(tmp_path), fails, factory=True)
    assert "does not start" in str(raised.value)
    assert "failing" not in client.list_backends() and "failing" not in client.list_endpoints()


def test_a_startup_that_the_app_says_has_failed_is_the_replicas_reason(client: serve.Client) -> None:
    with pytest.raises(serve.BackendFailed, match="the shelves are empty"):
        client.mount("/failing", apps.refusing)


def test_a_startup_has_the_start_timeout(client: serve.Client, tmp_path: Path) -> None:
    with pytest.raises(serve.BackendFailed, match="start_timeout_s of 1 s"):
        client.mount("/failing", apps.telling, Tally(tmp_path), "hang", factory=True, config={"start_timeout_s": 1})


def test_a_shutdown_that_fails_keeps_nobody(client: serve.Client, tmp_path: Path) -> None:
    tally, name = Tally(tmp_path), new_name("app")
    client.mount(f"/{name}", apps.telling, tally, "shutdown", factory=True)
    client.delete_endpoint(name)
    client.delete_backend(name)
    assert tally.lines[0] == "startup"
    wait_until(lambda: tally.lines == ["startup", "shutdown"])


# Who may call an app, and what it may not have.


def test_a_handle_is_told_that_an_app_answers_http_only(client: serve.Client, shop: str) -> None:
    with pytest.raises(serve.NoHttpRequest, match="a handle sends none"):
        client.get_handle("shop").remote(1).result(timeout=30)


def test_an_app_has_no_methods_to_call_by_name(shop: str) -> None:
    refused = httpx.get(f"{shop}/items/1", headers={"X-SERVE-CALL-METHOD": "openapi"})
    assert refused.status_code == 404 and "no method 'openapi'" in refused.json()["detail"]


def test_batches_and_arguments_are_refused_at_once(client: serve.Client) -> None:
    with pytest.raises(serve.BadValue, match="leave max_batch_size out"):
        client.create_backend("b", apps.shop, config={"max_batch_size": 4})
    with pytest.raises(serve.BadValue, match="no constructor arguments"):
        client.create_backend("b", apps.shop, 1)
    with pytest.raises(serve.BadType, match="leave factory out"):
        client.create_backend("b", apps.shop, factory=True)


def test_a_batch_size_is_refused_also_later(client: serve.Client, shop: str) -> None:
    with pytest.raises(serve.BadValue, match="leave max_batch_size out"):
        client.update_backend_config("shop", {"max_batch_size": 4})


def test_that_jobs_are_tried_again_is_refused_at_once_later_and_where_the_replica_finds_the_app(client: serve.Client, shop: str) -> None:
    config = {"retry": serve.Retry()}
    with pytest.raises(serve.BadValue, match="leave retry out"):
        client.create_backend("b", apps.shop, config=config)
    with pytest.raises(serve.BadValue, match="leave retry out"):
        client.update_backend_config("shop", config)
    with pytest.raises(serve.MQServeError, match="leave retry out"):
        client.create_backend("b", "tests.apps:shop", config=config)


def test_a_job_of_an_app_has_failed_by_its_status_and_says_so(client: serve.Client, shop: str) -> None:
    for path, state, status in ("/nothing", "succeeded", 404), ("/broken", "failed", 500):
        accepted = httpx.get(f"{shop}{path}", headers={"Prefer": "respond-async"})
        assert accepted.status_code == 202, accepted.text
        job = client.http_url() + accepted.headers["location"]
        view = httpx.get(f"{job}?wait=30", timeout=40).json()
        told = {"type": "HTTPStatus", "message": "it was answered with status 500", "status": 500} if status == 500 else None
        assert (view["status"], view.get("error"), httpx.get(f"{job}/result").status_code) == (state, told, status)


def test_what_a_factory_returns_must_be_an_app(client: serve.Client) -> None:
    with pytest.raises(serve.BackendFailed, match="its factory returned a dict, which is no ASGI app"):
        client.create_backend("b", dict, factory=True)


# Where an app comes from.


def test_an_import_string_of_an_app_is_found_to_be_one(client: serve.Client, deploy: Deploy) -> None:
    name = new_name("r")
    backend = deploy("tests.apps:shop", route=f"/{name}")
    assert client.list_endpoints()[backend].get("prefix")
    assert httpx.get(f"{client.http_url()}/{name}/items/4").json() == {"item_id": 4, "wanted": 1}


def test_each_replica_has_an_app_of_its_own_by_import_string_and_by_factory(client: serve.Client, mount: Mount, tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    by_name = mount("tests.apps:shop", config={"num_replicas": 3})
    by_factory = mount("tests.apps:telling", tally, factory=True, config={"num_replicas": 3})
    assert tally.lines == ["startup"] * 3
    assert {httpx.get(f"{by_name}/state").json()["own_loop"] for _ in range(12)} == {True}
    assert httpx.get(f"{by_factory}/hello").json() == "hello"


def test_new_code_may_be_an_app_and_back(client: serve.Client, deploy: Deploy) -> None:
    url, name = deploy.named(lambda request: "a handler")
    client.update_backend(name, apps.behind, None, factory=True)
    assert httpx.get(url).json() == {"detail": "Not Found"}
    client.update_backend(name, lambda request: "a handler again")
    assert httpx.get(url).text == "a handler again"


@distributed_only
def test_an_app_of_the_program_itself_is_refused_with_the_way_out(client: serve.Client) -> None:
    with pytest.raises(serve.NotEncodable, match=r"give a function that makes it \(factory=True\)"):
        client.create_backend("b", FastAPI())


@pytest.mark.parametrize("form", ["embedded"], indirect=True)
def test_one_object_is_for_one_replica_in_the_embedded_form(client: serve.Client, shop: str) -> None:
    with pytest.raises(serve.BadValue, match="can have one replica and not 2"):
        client.create_backend("b", apps.shop, config={"num_replicas": 2})
    with pytest.raises(serve.BadValue, match="can have one replica and not 2"):
        client.create_backend("b", apps.Multiplier, config={"num_replicas": 2})
    with pytest.raises(serve.BadValue, match="can have one replica and not 2"):
        client.update_backend_config("shop", {"num_replicas": 2})


def test_an_app_object_belongs_to_one_backend_in_the_embedded_form(client: serve.Client, mount: Mount, form: str) -> None:
    """Each replica of the distributed form is a process, with an app of its own."""
    first = mount(apps.starlette_app)
    name = first.rpartition("/")[2]
    if form == "distributed":
        assert httpx.get(f"{mount(apps.starlette_app)}/hello/ada").json() == {"hello": "ada"}
        return
    with pytest.raises(serve.BackendFailed, match=rf"the same app object as backend '{name}'.*backend='{name}', route="):
        mount(apps.starlette_app)
    with pytest.raises(serve.BackendFailed, match="the same app object"), client.deploying():
        mount(apps.litestar_app)
        mount(apps.litestar_app)
    client.update_backend(name, apps.starlette_app)
    client.create_endpoint("second", backend=name, route="/second")
    assert httpx.get(f"{client.http_url()}/second/where/x").json()["root_path"] == "/second"
    client.delete_endpoint("second")
    assert httpx.get(f"{first}/hello/ada").json() == {"hello": "ada"}


# A class whose methods are routes.


def test_the_methods_of_a_class_are_routes_with_its_one_instance(mount: Mount) -> None:
    url = mount(apps.Multiplier, 3)
    answers = [httpx.get(f"{url}/times/5?more=1").json() for _ in range(2)]
    assert answers == [{"product": 16, "calls": 1}, {"product": 16, "calls": 2}]
    assert httpx.post(f"{url}/times", json=[1, 2]).json() == [3, 6]
    assert httpx.get(f"{url}/factor").json() == 3
    assert httpx.get(f"{url}/outside/4").json() == 4
    assert httpx.get(f"{url}/parts/half/4").json() == 6


@pytest.mark.parametrize("included", ["before", "after"])
def test_the_methods_of_a_class_may_be_routes_of_a_router_that_the_app_includes(included: str) -> None:
    app, router = FastAPI(), APIRouter(prefix="/parts", tags=["parts"])

    class Parts:
        def __init__(self) -> None:
            self.whole = 12

        @router.get("/{number}")
        def part(self, number: int) -> float:
            return self.whole / number

        @router.websocket("/told")
        async def tell(self, socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_json(self.whole)
            await socket.close()

    if included == "before":
        app.include_router(router, prefix="/v1")
    parts: Any = serve.ingress(app)(Parts)()
    if included == "after":
        app.include_router(router, prefix="/v1")
    with TestClient(parts.__call__) as client:
        assert client.get("/v1/parts/4").json() == 3
        operation = client.get("/openapi.json").json()["paths"]["/v1/parts/{number}"]["get"]
        assert [one["name"] for one in operation["parameters"]] == ["number"] and operation["tags"] == ["parts"]
        with client.websocket_connect("/v1/parts/told") as socket:
            assert socket.receive_json() == 12


def test_the_schema_of_a_class_shows_no_self(mount: Mount) -> None:
    schema = httpx.get(f"{mount(apps.Multiplier)}/openapi.json").json()
    operation = schema["paths"]["/times/{number}"]["get"]
    assert [one["name"] for one in operation["parameters"]] == ["number", "more"]
    assert operation["description"] == "Multiplies a number."
    assert "requestBody" not in operation


def test_a_class_of_routes_may_be_reconfigured(client: serve.Client, mount: Mount) -> None:
    url = mount(apps.Multiplier, config={"user_config": {"factor": 5}})
    assert httpx.get(f"{url}/factor").json() == 5
    client.update_backend_config(url.rpartition("/")[2], {"user_config": {"factor": 6}})
    assert httpx.get(f"{url}/factor").json() == 6


def test_only_a_class_without_a_call_takes_the_routes_of_an_app() -> None:
    class Calling:
        def __call__(self, request: Any) -> None: ...

    with pytest.raises(serve.BadType, match="has a __call__"):
        serve.ingress(FastAPI())(Calling)
    with pytest.raises(serve.BadType, match="decorates a class"):
        serve.ingress(FastAPI())(lambda request: 1)  # type: ignore[type-var]
    with pytest.raises(serve.BadType, match="is none"):
        serve.ingress(print)  # type: ignore[arg-type]
