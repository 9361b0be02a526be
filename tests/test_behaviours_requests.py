"""What a handler finds in an HTTP request, beside its body: all that Starlette's has. In both forms."""

import asyncio
import http.client
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, new_name, wait_until
from tests.tallies import Tally

PLAIN_STATE = {"user": "ada", "roles": ["admin"], "level": 3, "score": 2.5, "token": b"\xff", "nobody": None}


class SetsState:
    """A middleware that sets what is plain data, and what is not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["state"] |= PLAIN_STATE | {"database": object(), "pair": (1, 2)}
        await self._app(scope, receive, send)


HTTP_OPTIONS = {"middlewares": [Middleware(SetsState)]}


def get(url: str, path: str) -> str:
    """The body under a path exactly as it is written here, which httpx would mend."""
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)) as connection:
        connection.request("GET", path)
        return connection.getresponse().read().decode()


# The path.


@pytest.mark.parametrize("rest", ["plain", "kg%2Fs", "%E6%96%87", "a%20b%3Fc", "%41", "a//b", "%00", "~tilde-._"])
def test_the_raw_path_is_what_stood_in_the_request_line(deploy: Deploy, rest: str) -> None:
    route = new_name("r")

    def raw_path(request: serve.Request) -> str:
        return str(request.scope["raw_path"].decode("ascii"))

    deploy(raw_path, route=f"/{route}/{{rest:path}}")
    assert get(deploy.url, f"/{route}/{rest}?query=%2F") == f"/{route}/{rest}"


# State.


def test_what_a_middleware_sets_to_plain_data_travels(deploy: Deploy) -> None:
    def state(request: serve.Request) -> Any:
        found = {name: getattr(request.state, name) for name in ("user", "roles", "level", "score", "nobody")}
        return found | {"token": request.state.token.hex(), "scope": request.scope["state"]["user"]}

    assert httpx.get(deploy.at(state)).json() == {
        "user": "ada", "roles": ["admin"], "level": 3, "score": 2.5, "nobody": None, "token": "ff", "scope": "ada",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), [("database", "object"), ("pair", "tuple")])
def test_what_does_not_travel_says_so_when_it_is_asked_for(deploy: Deploy, name: str, kind: str) -> None:
    def state(request: serve.Request) -> str:
        try:
            return str(getattr(request.state, name))
        except AttributeError as error:
            return str(error)

    assert httpx.get(deploy.at(state)).text == (
        f"a middleware in the proxy set state.{name} to a {kind}, which does not travel to a replica: set plain data there"
    )


def test_a_handler_has_a_state_of_its_own_for_each_request(deploy: Deploy) -> None:
    def state(request: serve.Request) -> Any:
        before = getattr(request.state, "mine", None)
        request.state.mine = "set"
        return [before, request.state.mine]

    url = deploy.at(state)
    assert [httpx.get(url).json() for _ in range(2)] == [[None, "set"]] * 2


# Disconnection.


def test_a_client_that_waits_is_not_disconnected(deploy: Deploy) -> None:
    async def ask(request: serve.Request) -> bool:
        return await request.is_disconnected()

    assert httpx.get(deploy.at(ask)).json() is False


def test_a_client_that_leaves_is_disconnected(deploy: Deploy, tmp_path: Path) -> None:
    gate, seen = Gate(tmp_path), Tally(tmp_path)

    async def wait(request: serve.Request) -> None:
        gate.pass_through("came")
        try:
            while not await request.is_disconnected():
                await asyncio.sleep(0.01)
        finally:
            seen.note(await request.is_disconnected())

    gate.open()
    url = deploy.at(wait)
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(url, timeout=0.5)
    wait_until(lambda: seen.lines == ["True"])


def test_receive_gives_the_body_and_then_the_disconnection(deploy: Deploy, tmp_path: Path) -> None:
    seen = Tally(tmp_path)

    async def read(request: serve.Request) -> None:
        try:
            while (message := await request.receive())["type"] != "http.disconnect":
                seen.note(f"{message['body'].decode()} {message['more_body']}")
        finally:
            seen.note("end")

    url = deploy.at(read)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, content=b"body", timeout=0.5)
    wait_until(lambda: seen.lines == ["body False", "end"])


def test_the_body_can_be_streamed(deploy: Deploy) -> None:
    async def read(request: serve.Request) -> int:
        try:
            return sum([len(chunk) async for chunk in request.stream()])
        except ClientDisconnect:
            return -1

    assert httpx.post(deploy.at(read), content=b"x" * 100_000).json() == 100_000


# Forms.


def plain_form(request: serve.Request) -> Any:
    """What a plain handler finds in `data`."""
    form = request.data
    if form is None:
        return None
    return {name: _shown(value) for name, value in form.items()}


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return [_shown(one) for one in value]
    return value if isinstance(value, str) else [value.filename, value.content_type, value.file.read().decode()]


async def async_form(request: serve.Request) -> Any:
    async with request.form() as form:
        return {name: value if isinstance(value, str) else (await value.read()).decode() for name, value in form.items()}


def test_a_form_is_a_dict_for_a_plain_handler(deploy: Deploy) -> None:
    url = deploy.at(plain_form)
    assert httpx.post(url, data={"name": "ada", "tag": ["a", "b"]}).json() == {"name": "ada", "tag": ["a", "b"]}


def test_files_can_be_read_without_an_await(deploy: Deploy) -> None:
    url, big = deploy.at(plain_form), "x" * 3_000_000
    files = [
        ("one", ("a.txt", b"hello", "text/plain")),
        ("two", ("b.bin", big.encode(), "image/png")),
        ("two", ("c.bin", b"", "image/png")),
    ]
    assert httpx.post(url, data={"name": "ada"}, files=files).json() == {
        "name": "ada",
        "one": ["a.txt", "text/plain", "hello"],
        "two": [["b.bin", "image/png", big], ["c.bin", "image/png", ""]],
    }


def test_an_async_handler_reads_the_same_form(deploy: Deploy) -> None:
    url = deploy.at(async_form)
    assert httpx.post(url, data={"name": "ada"}, files={"file": b"hello"}).json() == {"name": "ada", "file": "hello"}
    assert httpx.post(url, data={"name": "ada"}).json() == {"name": "ada"}


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"nothing of the kind"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\nnameless\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="a"; filename="f"\r\n\r\ncut off'),
        ("application/x-www-form-urlencoded", b"&".join(b"a=1" for _ in range(2000))),
        ("application/x-www-form-urlencoded", b"a=" + b"x" * 2_000_000),
    ],
    ids=["no boundary", "empty boundary", "no form", "no name", "cut off", "too many fields", "too large a field"],
)
@pytest.mark.parametrize("handler", [plain_form, async_form])
def test_a_bad_form_is_the_clients_fault(deploy: Deploy, handler: Any, content_type: str, body: bytes) -> None:
    response = httpx.post(deploy.at(handler), content=body, headers={"content-type": content_type})
    assert response.status_code == 422 and "the form does not parse" in response.json()["detail"]


# Empty bodies.


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "content_type",
    [
        "application/json", "Application/JSON", "application/json; charset=utf-8", "application/vnd.api+json",
        "application/x+json;charset=utf-8", "application/msgpack", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    ],
)  # fmt: skip
def test_an_empty_body_is_none_whatever_it_is_called(deploy: Deploy, method: str, content_type: str) -> None:
    url = deploy.at(lambda request: repr(request.data))
    assert httpx.request(method, url, headers={"content-type": content_type}).text == "None"


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "application/vnd.api+json"])
def test_json_is_decoded_whatever_kind_it_is(deploy: Deploy, content_type: str) -> None:
    url = deploy.at(lambda request: request.data)
    assert httpx.post(url, content=b'{"a": 1}', headers={"content-type": content_type}).json() == {"a": 1}
    assert httpx.post(url, content=b'{"a": ', headers={"content-type": content_type}).status_code == 422


def test_data_is_decoded_once(deploy: Deploy) -> None:
    def twice(request: serve.Request) -> bool:
        return request.data is request.data

    assert httpx.post(deploy.at(twice), json={"a": 1}).json() is True
