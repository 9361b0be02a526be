"""What an HTTP client sees, in both forms: paths, bodies, answers, refusals."""

import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydantic
import pytest
from starlette.convertors import Convertor
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, new_name, wait_until

# Paths.


def describe_params(request: serve.Request) -> dict[str, Any]:
    """Every path parameter with the type it has."""
    return {name: [type(value).__name__, value] for name, value in request.path_params.items()}


@pytest.fixture(scope="module")
def describing(client: serve.Client) -> Iterator[str]:
    """A backend that tells its path parameters, for routes of any shape."""
    deploy = Deploy(client)
    yield deploy(describe_params)
    deploy.undo()


def test_an_int_and_a_float_in_the_path_arrive_exactly(deploy: Deploy) -> None:
    def both(request: serve.Request) -> str:
        return repr(request.path_params)

    name = new_name("api")
    deploy(both, route=f"/{name}/{{user_id:int}}/{{number:float}}")
    assert httpx.get(f"{deploy.url}/{name}/123/3.14").text == "{'user_id': 123, 'number': 3.14}"


@pytest.mark.parametrize(
    ("route", "path", "params"),
    [
        ("{value:float}", "0.1", {"value": ["float", 0.1]}),
        ("{value:float}", "16777217.123456789", {"value": ["float", 16777217.123456789]}),
        ("{value:int}", "123456789012345678901234567890", {"value": ["int", 123456789012345678901234567890]}),
        (
            "{value:uuid}",
            "6b4e03423667401b9ef3a04c5d9f3b0e",
            {"value": ["UUID", "6b4e0342-3667-401b-9ef3-a04c5d9f3b0e"]},
        ),
        ("files/{value:path}", "files/a/b%20c/d.txt", {"value": ["str", "a/b c/d.txt"]}),
        ("{value}", "3.14", {"value": ["str", "3.14"]}),
        ("{value:str}", "gr%C3%BC%C3%9Fe", {"value": ["str", "grüße"]}),
        (
            "{a}/{b:int}-{c:float}/{d:path}",
            "x/7-1.5/y/z",
            {"a": ["str", "x"], "b": ["int", 7], "c": ["float", 1.5], "d": ["str", "y/z"]},
        ),
    ],
)
def test_a_path_parameter_arrives_as_its_convertor_says(
    client: serve.Client, describing: str, route: str, path: str, params: dict[str, list[Any]]
) -> None:
    name = new_name("api")
    client.create_endpoint(name, backend=describing, route=f"/{name}/{route}")
    assert httpx.get(f"{client.http_url()}/{name}/{path}").json() == params
    client.delete_endpoint(name)


def test_a_registered_convertor_matches_and_converts(client: serve.Client, deploy: Deploy) -> None:
    class Hexadecimal(Convertor[int]):
        regex = "[0-9a-f]+"

        def convert(self, value: str) -> int:
            return int(value, 16)

        def to_string(self, value: int) -> str:
            return f"{value:x}"

    client.register_convertor("hexadecimal", Hexadecimal)
    name = new_name("color")
    deploy(describe_params, route=f"/{name}/{{color:hexadecimal}}")
    assert httpx.get(f"{deploy.url}/{name}/ff8000").json() == {"color": ["int", 0xFF8000]}
    assert httpx.get(f"{deploy.url}/{name}/red").status_code == 404


def test_a_path_that_no_convertor_takes_is_not_found(deploy: Deploy) -> None:
    name = new_name("api")
    deploy(describe_params, route=f"/{name}/{{user_id:int}}")
    assert httpx.get(f"{deploy.url}/{name}/abc").status_code == 404


# Answers.


class Point(pydantic.BaseModel):
    x: int
    y: float


def numbers() -> Iterator[bytes]:
    yield from (b"1, ", b"2, ", b"3")


async def letters() -> AsyncIterator[str]:
    for letter in "abc":
        yield letter


ANSWERS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "bytes": lambda: b"\x00\xff",
    "text": lambda: "grüße",
    "list": lambda: [1, "two", None],
    "tuple": lambda: (1, 2),
    "bytes-inside": lambda: {"name": b"mq"},
    "array": lambda: np.array([[1.5, 2.0], [3.0, 4.0]]),
    "array-inside": lambda: {"scores": np.array([1, 2]), "best": np.int64(2), "mean": np.float32(1.5), "sure": np.bool_(True)},
    "model": lambda: Point(x=1, y=2.5),
    "model-inside": lambda: [Point(x=1, y=2.5)],
    "exception": lambda: {"error": ValueError("no such digit")},
    "response": lambda: Response("made", status_code=201, headers={"x-color": "blue"}, media_type="text/plain"),
    "two-cookies": lambda: two_cookies(),
    "html": lambda: HTMLResponse("<p>hello</p>"),
    "redirect": lambda: RedirectResponse("/elsewhere"),
    "json-response": lambda: JSONResponse({"a": 1}, status_code=202),
    "stream": lambda: StreamingResponse(numbers(), media_type="text/csv"),
    "async-stream": lambda: StreamingResponse(letters(), status_code=203),
}


def two_cookies() -> Response:
    response = Response(b"")
    response.set_cookie("a", "1")
    response.set_cookie("b", "2")
    return response


@pytest.fixture(scope="module")
def answers(client: serve.Client) -> Iterator[str]:
    """The URL under which every one of ANSWERS is to be had."""

    def answer(request: serve.Request) -> Any:
        return ANSWERS[request.path_params["kind"]]()

    deploy = Deploy(client)
    name = new_name("answers")
    deploy(answer, route=f"/{name}/{{kind}}")
    yield f"{deploy.url}/{name}"
    deploy.undo()


@pytest.mark.parametrize(
    ("kind", "content_type", "body"),
    [
        ("none", "text/plain", b""),
        ("bytes", "text/plain", b"\x00\xff"),
        ("text", "text/plain; charset=utf-8", "grüße".encode()),
        ("stream", "text/csv; charset=utf-8", b"1, 2, 3"),
        ("html", "text/html; charset=utf-8", b"<p>hello</p>"),
    ],
)
def test_plain_results_are_the_body_as_it_is(answers: str, kind: str, content_type: str, body: bytes) -> None:
    response = httpx.get(f"{answers}/{kind}")
    assert (response.status_code, response.headers["content-type"], response.content) == (200, content_type, body)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("list", [1, "two", None]),
        ("tuple", [1, 2]),
        ("bytes-inside", {"name": "mq"}),
        ("array", [[1.5, 2.0], [3.0, 4.0]]),
        ("array-inside", {"scores": [1, 2], "best": 2, "mean": 1.5, "sure": True}),
        ("model", {"x": 1, "y": 2.5}),
        ("model-inside", [{"x": 1, "y": 2.5}]),
        ("exception", {"error": "no such digit"}),
    ],
)
def test_other_results_are_json(answers: str, kind: str, value: object) -> None:
    response = httpx.get(f"{answers}/{kind}")
    assert (response.status_code, response.headers["content-type"], response.json()) == (200, "application/json", value)


def test_a_response_is_sent_with_its_status_and_headers(answers: str) -> None:
    response = httpx.get(f"{answers}/response")
    assert (response.status_code, response.headers["x-color"], response.text) == (201, "blue", "made")


def test_a_response_may_set_two_cookies(answers: str) -> None:
    assert dict(httpx.get(f"{answers}/two-cookies").cookies) == {"a": "1", "b": "2"}


def test_a_redirect_is_sent_as_one(answers: str) -> None:
    response = httpx.get(f"{answers}/redirect")
    assert (response.status_code, response.headers["location"]) == (307, "/elsewhere")


def test_a_json_response_keeps_its_status(answers: str) -> None:
    response = httpx.get(f"{answers}/json-response")
    assert (response.status_code, response.json()) == (202, {"a": 1})


def test_an_async_stream_is_collected(answers: str) -> None:
    response = httpx.get(f"{answers}/async-stream")
    assert (response.status_code, response.text) == (203, "abc")


def test_every_answer_names_its_request(answers: str) -> None:
    ids = {httpx.get(f"{answers}/none").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3 and all(len(one) == 32 for one in ids)


# Requests.


@pytest.fixture(scope="module")
def inspect_url(client: serve.Client) -> Iterator[str]:
    """A handler that says what it got; the last part of the path says what of it."""

    async def inspect(request: serve.Request) -> Any:
        match request.path_params["what"]:
            case "body":
                return await request.body()
            case "json":
                return await request.json()
            case "data":
                return {"type": type(request.data).__name__, "value": request.data}
            case "form":
                return dict(await request.form())
            case "query":
                return list(request.query_params.multi_items())
            case "head":
                return {"method": request.method, "path": request.url.path, "color": request.headers.get("x-color")}
            case other:
                return f"nothing called {other}"

    deploy = Deploy(client)
    name = new_name("inspect")
    deploy(inspect, route=f"/{name}/{{what}}", methods=("GET", "POST", "PUT", "DELETE"))
    yield f"{deploy.url}/{name}"
    deploy.undo()


def test_the_handler_reads_the_body(inspect_url: str) -> None:
    assert httpx.post(f"{inspect_url}/body", content=b"\x00\x01").content == b"\x00\x01"


def test_the_handler_reads_json(inspect_url: str) -> None:
    assert httpx.post(f"{inspect_url}/json", json={"a": [1, 2.5, None, "ü"]}).json() == {"a": [1, 2.5, None, "ü"]}


def test_the_handler_reads_a_form(inspect_url: str) -> None:
    assert httpx.post(f"{inspect_url}/form", data={"color": "blue", "size": "7"}).json() == {"color": "blue", "size": "7"}


@pytest.mark.parametrize(
    ("content_type", "body", "type_name", "value"),
    [
        ("application/json", b'{"a": 1}', "dict", {"a": 1}),
        ("application/json; charset=utf-8", b"[1]", "list", [1]),
        ("application/msgpack", b"\x81\xa1a\x01", "dict", {"a": 1}),
        ("text/plain; charset=utf-8", "grüße".encode(), "str", "grüße"),
        ("application/octet-stream", b"raw", "bytes", "raw"),
        ("image/png", b"png", "bytes", "png"),
    ],
)
def test_data_is_the_body_by_its_content_type(inspect_url: str, content_type: str, body: bytes, type_name: str, value: object) -> None:
    response = httpx.post(f"{inspect_url}/data", content=body, headers={"content-type": content_type})
    assert response.json() == {"type": type_name, "value": value}


def test_the_handler_reads_the_query_with_its_repeats(inspect_url: str) -> None:
    assert httpx.get(f"{inspect_url}/query?a=1&b=x%20y&a=2").json() == [["a", "1"], ["b", "x y"], ["a", "2"]]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_the_handler_reads_method_path_and_headers(inspect_url: str, method: str) -> None:
    response = httpx.request(method, f"{inspect_url}/head", headers={"X-Color": "blue"})
    assert response.json() == {"method": method, "path": httpx.URL(f"{inspect_url}/head").path, "color": "blue"}


def test_a_body_of_some_megabytes_arrives_whole(inspect_url: str) -> None:
    body = bytes(range(256)) * (3 * 4096)
    assert httpx.post(f"{inspect_url}/body", content=body, timeout=30).content == body


@pytest.mark.parametrize("what", ["data", "json"])
def test_malformed_json_is_unprocessable(inspect_url: str, what: str) -> None:
    response = httpx.post(f"{inspect_url}/{what}", content=b'{"a": ', headers={"content-type": "application/json"})
    assert_problem(response, 422)


def test_a_handler_may_catch_malformed_json(deploy: Deploy) -> None:
    async def forgiving(request: serve.Request) -> str:
        try:
            return str(request.data)
        except serve.MQServeError:
            return "no JSON"

    response = httpx.post(deploy.at(forgiving), content=b"{", headers={"content-type": "application/json"})
    assert (response.status_code, response.text) == (200, "no JSON")


def test_a_public_method_is_called_by_its_header(deploy: Deploy) -> None:
    class Counter:
        def __call__(self, request: serve.Request) -> str:
            return "called"

        def total(self, request: serve.Request) -> str:
            return f"total of {request.data}"

    url = deploy.at(Counter)
    response = httpx.post(url, json=[1, 2], headers={"X-SERVE-CALL-METHOD": "total"})
    assert (response.status_code, response.text) == (200, "total of [1, 2]")
    assert httpx.get(url).text == "called"


def test_a_method_that_is_not_public_is_not_found(deploy: Deploy) -> None:
    class Keeper:
        def __call__(self, request: serve.Request) -> str:
            return "called"

        def _secret(self, request: serve.Request) -> str:
            return "told"

        def reconfigure(self, request: object) -> str:
            return "reconfigured"

        def check_health(self, request: object) -> str:
            return "healthy"

    url = deploy.at(Keeper)
    for method in ("_secret", "__init__", "__class__", "reconfigure", "check_health", "missing"):
        assert_problem(httpx.get(url, headers={"x-serve-call-method": method}), 404, "method", method)


# Refusals.


def assert_problem(response: httpx.Response, status: int, *words: str) -> None:
    """RFC 9457 with the request's id, and these words in its detail."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json"), response.text
    problem = response.json()
    assert problem["status"] == status and problem["request_id"] == response.headers["x-request-id"]
    assert all(word in problem["detail"] for word in words), problem["detail"]


def test_an_unknown_path_is_not_found_with_a_sentence(url: str) -> None:
    response = httpx.get(f"{url}/nowhere")
    assert_problem(response, 404)
    host = httpx.URL(url).netloc.decode()
    assert response.json()["detail"] == f"Path /nowhere not found. Please ping http://{host}/-/routes for routing table."


def test_an_unknown_system_path_is_not_found_with_a_sentence(url: str) -> None:
    assert_problem(httpx.get(f"{url}/-/nothing"), 404, "System path /-/nothing not found.")


def test_a_method_that_is_not_listed_is_refused_with_a_sentence(deploy: Deploy) -> None:
    name = new_name("r")
    deploy(describe_params, route=f"/{name}", methods=("GET", "POST"))
    response = httpx.delete(f"{deploy.url}/{name}")
    assert_problem(response, 405)
    assert response.json()["detail"] == "Methods DELETE not allowed. Available HTTP methods are ['GET', 'POST']."
    assert response.headers["allow"] == "GET, POST"


def test_head_follows_get(answers: str) -> None:
    response = httpx.head(f"{answers}/text")
    assert (response.status_code, response.content, response.headers["content-length"]) == (200, b"", str(len("grüße".encode())))


def test_head_is_refused_where_get_is(deploy: Deploy) -> None:
    name = new_name("r")
    deploy(describe_params, route=f"/{name}", methods=("POST",))
    assert httpx.head(f"{deploy.url}/{name}").status_code == 405


def test_a_users_exception_is_a_500_without_its_traceback(deploy: Deploy) -> None:
    def fail(request: serve.Request) -> None:
        raise LookupError("the secret of the handler")

    response = httpx.get(deploy.at(fail))
    assert_problem(response, 500, "LookupError")
    assert "secret" not in response.text and "Traceback" not in response.text


def test_a_result_that_is_no_json_is_a_500_that_names_its_type(deploy: Deploy) -> None:
    def odd(request: serve.Request) -> object:
        return {"complex": 1j}

    assert_problem(httpx.get(deploy.at(odd)), 500, "NotEncodable")


def test_a_late_answer_is_a_504_that_says_queue_or_run(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def wait(request: serve.Request) -> str:
        gate.pass_through()
        return "passed"

    url = deploy.at(wait, request_timeout_s=2)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(httpx.get, url, timeout=30)
        wait_until(lambda: gate.came == 1)
        waiting = threads.submit(httpx.get, url, timeout=30)
        assert_problem(running.result(), 504, "(run)")
        assert_problem(waiting.result(), 504, "(queue)")
    gate.open()
    wait_until(lambda: httpx.get(url, timeout=30).text == "passed")
    assert gate.came == 2, "late work was done"


def test_too_many_waiting_requests_are_a_429_at_once(deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def wait(request: serve.Request) -> str:
        gate.pass_through()
        return "passed"

    url = deploy.at(wait, max_queued_requests=2)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(httpx.get, url, timeout=30)
        wait_until(lambda: gate.came == 1)
        others = [threads.submit(httpx.get, url, timeout=30) for _ in range(6)]
        refused = wait_until(lambda: done_of(others) if len(done_of(others)) >= 4 else [])
        gate.open()
        served = [running.result(), *(future.result() for future in others if future not in refused)]
    for future in refused:
        assert_problem(future.result(), 429, "max_queued_requests")
        assert int(future.result().headers["retry-after"]) >= 1
    assert [response.text for response in served] == ["passed"] * 3


def done_of(futures: list[Future[httpx.Response]]) -> list[Future[httpx.Response]]:
    return [future for future in futures if future.done()]


def test_200_kb_of_headers_are_a_431_and_no_other_request_notices(answers: str) -> None:
    with httpx.Client() as pool, ThreadPoolExecutor(8) as threads:
        others = [threads.submit(pool.get, f"{answers}/text", timeout=30) for _ in range(100)]
        too_large = [httpx.get(f"{answers}/text", headers={"x-large": "x" * 200_000}) for _ in range(5)]
        statuses = [future.result().status_code for future in others]
    for response in too_large:
        assert_problem(response, 431, "bytes")
    assert statuses == [200] * 100
    assert httpx.get(f"{answers}/text").status_code == 200


def test_60_kb_of_headers_are_served(answers: str) -> None:
    assert httpx.get(f"{answers}/text", headers={"x-large": "x" * 60_000}).status_code == 200


def test_a_body_over_64_mib_is_a_413(inspect_url: str) -> None:
    def stream() -> Iterator[bytes]:
        chunk = bytes(1024 * 1024)
        for _ in range(64):
            yield chunk
        yield b"x"

    assert_problem(httpx.post(f"{inspect_url}/body", content=stream(), timeout=60), 413, "bytes")


# Routes and health.


def test_routes_appear_change_and_vanish_without_a_restart(client: serve.Client, deploy: Deploy) -> None:
    def hello(request: serve.Request) -> str:
        return "hello"

    backend = deploy(hello)
    endpoint = new_name("e")
    path = f"/{endpoint}"
    assert httpx.get(deploy.url + path).status_code == 404
    client.create_endpoint(endpoint, backend=backend, route=path)
    assert httpx.get(deploy.url + path).text == "hello"
    client.delete_endpoint(endpoint)
    assert httpx.get(deploy.url + path).status_code == 404
    client.create_endpoint(endpoint, backend=backend, route=path, methods=["POST"])
    assert (httpx.get(deploy.url + path).status_code, httpx.post(deploy.url + path).text) == (405, "hello")
    client.delete_endpoint(endpoint)


def test_the_routing_table_is_public(deploy: Deploy) -> None:
    name = new_name("r")
    endpoint = deploy(describe_params, route=f"/{name}/{{a:int}}", methods=("GET", "PUT"))
    routes = httpx.get(f"{deploy.url}/-/routes").json()
    assert routes[f"/{name}/{{a:int}}"] == [endpoint, ["GET", "PUT"]]


def test_a_literal_path_wins_over_a_pattern(deploy: Deploy) -> None:
    def pattern(request: serve.Request) -> str:
        return "pattern"

    def literal(request: serve.Request) -> str:
        return "literal"

    name = new_name("r")
    deploy(pattern, route=f"/{name}/{{anything}}")
    deploy(literal, route=f"/{name}/me")
    assert (httpx.get(f"{deploy.url}/{name}/me").text, httpx.get(f"{deploy.url}/{name}/you").text) == ("literal", "pattern")


def test_the_proxy_is_alive_and_ready(url: str) -> None:
    assert httpx.get(f"{url}/-/healthz").json() == {"status": "ok"}
    ready = httpx.get(f"{url}/-/readyz")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)


def test_the_result_of_an_http_request_is_read_by_its_id_too(answers: str, client: serve.Client) -> None:
    response = httpx.get(f"{answers}/list")
    assert client.future(response.headers["x-request-id"]).result(timeout=30) == [1, "two", None]


def test_an_id_nobody_sent_has_no_result(client: serve.Client) -> None:
    ref = client.future(uuid.uuid4().hex)
    with pytest.raises(TimeoutError, match="no result yet"):
        ref.result(timeout=0.2)
    ref.cancel()


@pytest.mark.long
@pytest.mark.parametrize("form", ["embedded"], indirect=True)
def test_a_connection_is_kept_for_longer_than_servers_in_front_keep_theirs(url: str) -> None:
    """They use one again just when we close it, otherwise, and their clients hear of a bad gateway."""
    ports = []
    with httpx.Client(limits=httpx.Limits(keepalive_expiry=60)) as client:
        for pause_s in (6, 0):  # more than uvicorn's own patience
            with client.stream("GET", f"{url}/-/healthz") as response:
                ports.append(response.extensions["network_stream"].get_extra_info("client_addr")[1])
                response.read()
            time.sleep(pause_s)
    assert ports[0] == ports[1]
