"""What an exception of a handler's comes to: a status, a sentence, and a bounded number of bytes. In both forms."""

import json
import math
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pydantic
import pytest
from starlette.exceptions import HTTPException

import mqserve as serve
from tests import imported
from tests.gates import Gate
from tests.instances import Deploy, new_name, wait_until

BIG = 5_000_000


class NotFound(HTTPException):
    """A subclass, as FastAPI's is."""

    def __init__(self) -> None:
        super().__init__(404, {"code": "no-such-order", "id": 17})  # type: ignore[arg-type]


class Item(pydantic.BaseModel):
    price: float


class Order(pydantic.BaseModel):
    pieces: int = pydantic.Field(gt=0)
    items: list[Item] = []


# HTTPException.


def test_an_http_exception_is_an_answer_with_its_status_headers_and_detail(deploy: Deploy) -> None:
    def handler(request: Any) -> None:
        raise serve.HTTPException(401, "who are you?", {"WWW-Authenticate": "Bearer"})

    response = httpx.get(deploy.at(handler))
    assert (response.status_code, response.json()["detail"]) == (401, "who are you?")
    assert response.headers["www-authenticate"] == "Bearer" and response.headers["content-type"] == "application/problem+json"


def test_the_detail_of_an_http_exception_may_be_any_json(deploy: Deploy) -> None:
    async def handler(request: Any) -> None:
        raise NotFound

    response = httpx.get(deploy.at(handler))
    assert (response.status_code, response.json()["detail"]) == (404, {"code": "no-such-order", "id": 17})


def test_an_http_exception_of_the_500s_shows_its_detail(deploy: Deploy) -> None:
    def handler(request: Any) -> None:
        raise HTTPException(500, "the database is away")

    assert httpx.get(deploy.at(handler)).json()["detail"] == "the database is away"


@pytest.mark.parametrize("status", [204, 304])
def test_an_http_exception_without_a_body_has_none(deploy: Deploy, status: int) -> None:
    def handler(request: Any) -> None:
        raise HTTPException(status)

    response = httpx.get(deploy.at(handler))
    assert (response.status_code, response.content) == (status, b"")


@pytest.mark.parametrize("status", [0, 99, 600, 1000])
def test_an_http_exception_with_a_status_that_is_none_is_a_500(deploy: Deploy, status: int) -> None:
    class Odd(HTTPException):
        def __init__(self) -> None:
            self.status_code, self.detail, self.headers = status, "odd", None

    def handler(request: Any) -> None:
        raise Odd

    assert httpx.get(deploy.at(handler)).status_code == 500


def test_an_http_exception_reaches_a_handle_as_itself(client: serve.Client, deploy: Deploy) -> None:
    def handler(request: Any) -> None:
        raise HTTPException(409, "taken")

    with pytest.raises(HTTPException) as raised:
        client.get_handle(deploy(handler)).remote().result(30)
    assert (raised.value.status_code, raised.value.detail) == (409, "taken")


# Validation.


VALIDATIONS: dict[str, Any] = {
    "pydantic": lambda request: Order.model_validate(request.data) and "valid",
    "pydantic, keywords": lambda request: Order(**request.data) and "valid",
    "pydantic, bytes": lambda request: Order.model_validate_json(request.raw) and "valid",
    "msgspec": lambda request: msgspec.convert(request.data, imported.OrderStruct) and "valid",
    "msgspec, bytes": lambda request: msgspec.json.decode(request.raw, type=imported.OrderStruct) and "valid",
}

BAD_ORDERS: list[Any] = [
    {},
    {"pieces": "many"},
    {"pieces": None},
    {"pieces": 1, "items": [{"price": 1}, {"price": "dear"}]},
    {"pieces": 1, "items": {}},
    [],
    "text",
]


@pytest.mark.parametrize("bad", BAD_ORDERS, ids=str)
@pytest.mark.parametrize("how", VALIDATIONS)
def test_data_of_the_request_that_does_not_validate_is_a_422(deploy: Deploy, how: str, bad: Any) -> None:
    if how == "pydantic, keywords" and not isinstance(bad, dict):
        pytest.skip("keywords come of a dict")
    url = deploy.at(VALIDATIONS[how])
    assert httpx.post(url, json={"pieces": 3}).text == "valid"
    response = httpx.post(url, json=bad)
    assert response.status_code == 422, response.text
    assert response.json()["detail"].startswith("body") and response.json()["errors"][0]["loc"][0] == "body"


def test_a_part_of_the_body_is_the_requests_too(deploy: Deploy) -> None:
    url = deploy.at(lambda request: Order.model_validate(request.data["order"]) and "valid")
    response = httpx.post(url, json={"order": {"pieces": -1}})
    assert response.status_code == 422 and response.json()["errors"][0]["loc"] == ["body", "pieces"]


def test_query_and_path_parameters_are_the_requests_too(deploy: Deploy) -> None:
    query = deploy.at(lambda request: Order.model_validate(dict(request.query_params)) and "valid")
    assert httpx.get(query, params={"pieces": "3"}).text == "valid"
    assert httpx.get(query, params={"pieces": "many"}).json()["errors"][0]["loc"] == ["query", "pieces"]
    name = new_name("r")
    deploy(lambda request: Order.model_validate(request.path_params) and "valid", route=f"/{name}/{{pieces}}")
    assert httpx.get(f"{deploy.url}/{name}/many").json()["errors"][0]["loc"] == ["path", "pieces"]


def test_of_a_batch_only_those_whose_data_is_bad_are_told_so(client: serve.Client, deploy: Deploy) -> None:
    @serve.accept_batch
    def handler(requests: list[Any]) -> list[str]:
        return [f"{Order.model_validate(request.data).pieces}" for request in requests]

    url = deploy.at(handler)
    assert httpx.post(url, json={"pieces": "many"}).status_code == 422
    assert httpx.post(url, json={"pieces": 3}).text == "3"


@pytest.mark.parametrize("own", [{"pieces": "few"}, {"pieces": 1, "items": [{"price": "cheap"}]}], ids=str)
@pytest.mark.parametrize(
    "validate", [Order.model_validate, lambda data: msgspec.convert(data, imported.OrderStruct)], ids=["pydantic", "msgspec"]
)
def test_data_of_the_handlers_own_that_does_not_validate_is_a_500(deploy: Deploy, validate: Any, own: Any) -> None:
    def handler(request: Any) -> None:
        _ = request.data
        validate(own)

    assert httpx.post(deploy.at(handler), json={"pieces": 3, "price": 4}).status_code == 500


# Errors of ours that a handler lets pass.


def composing(client: serve.Client, deploy: Deploy, child: str) -> str:
    """The URL of a backend that passes on what its child answers."""

    class Parent:
        def __init__(self) -> None:
            self.child = serve.get_handle(child, sync=False)

        async def __call__(self, request: Any) -> Any:
            return await (await self.child.remote())

    return deploy.at(Parent)


def test_a_full_queue_of_a_child_is_a_429_with_retry_after(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    child = deploy(lambda request: gate.pass_through(), max_queued_requests=1, max_concurrent_queries=1)
    handle, url = client.get_handle(child), composing(client, deploy, child)
    held = [handle.remote() for _ in range(6)]  # more than the replica and its queue hold
    wait_until(lambda: gate.came == 1 and sum(ref.done() for ref in held) >= 3)
    response = httpx.get(url)
    assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
    gate.open()


def test_spent_time_of_a_child_is_a_504(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    child = deploy(lambda request: gate.pass_through(), request_timeout_s=0.3)
    assert httpx.get(composing(client, deploy, child)).status_code == 504
    gate.open()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (serve.Overloaded("full", retry_after_s=2.5), 429),
        (serve.BrokerUnavailable("amqp://user@10.0.0.1 is away"), 503),
        (serve.StoreUnavailable("redis://10.0.0.1 is away"), 503),
        (serve.RequestTimeout("late"), 504),
        (serve.Cancelled("given up"), 499),
        (serve.RemoteError("somebody else's"), 500),
        (serve.InstanceError("none"), 500),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_ours_keeps_its_status(deploy: Deploy, error: serve.MQServeError, status: int) -> None:
    kind, words, retry_after_s = type(error), str(error), getattr(error, "retry_after_s", None)

    def handler(request: Any) -> None:
        raise kind(words) if retry_after_s is None else serve.Overloaded(words, retry_after_s=retry_after_s)

    response = httpx.get(deploy.at(handler))
    assert response.status_code == status and "10.0.0.1" not in response.text
    if status == 429:
        assert int(response.headers["retry-after"]) == math.ceil(2.5)
    assert ("retry-after" in response.headers) == (status in (429, 503))


# Bounds.


def parse_json(request: Any) -> Any:
    return json.loads(request.raw)


def parse_text(request: Any) -> str:
    return str(request.raw.decode())


def quote_it(request: Any) -> None:
    raise ValueError(f"cannot read {request.raw!r}")


def quote_its_lines(request: Any) -> None:
    raise ValueError("\n".join("line" for _ in range(BIG // 5)))


def hold_it(request: Any) -> None:
    error = LookupError("no such thing")
    error.body = request.raw  # type: ignore[attr-defined]
    raise error


def chain_it(request: Any) -> None:
    try:
        quote_it(request)
    except ValueError as error:
        raise LookupError("because of that") from error


async def detail_it(request: Any) -> None:
    raise HTTPException(400, {"body": request.raw.decode("latin-1")})  # type: ignore[arg-type]


@pytest.mark.parametrize("handler", [parse_json, parse_text, quote_it, quote_its_lines, hold_it, chain_it, detail_it])
def test_what_stays_of_a_failed_request_is_small(client: serve.Client, deploy: Deploy, handler: Any) -> None:
    response = httpx.post(deploy.at(handler), content=b'{"a": "' + b"\xff" * BIG, headers={"content-type": "application/octet-stream"})
    assert response.status_code in (400, 500) and len(response.content) < 50_000
    raw = stored(client, response.headers["x-request-id"])
    assert 0 < len(raw) < 100_000


def stored(client: serve.Client, request_id: str) -> bytes:
    """What the store keeps of the request's result."""
    links = client._connections
    return client._call(links.store.get(links.keys.future(request_id))) or b""


def test_an_answer_has_one_content_type_whatever_an_exception_says(deploy: Deploy) -> None:
    def fail(request: Any) -> None:
        raise serve.HTTPException(400, "no", {"Content-Type": "text/plain", "X-Request-Id": "mine", "X-Other": "kept"})

    response = httpx.get(deploy.at(fail))
    assert response.headers.get_list("content-type") == ["application/problem+json"]
    assert response.headers.get_list("x-request-id") == [response.json()["request_id"]]
    assert response.headers["x-other"] == "kept"
