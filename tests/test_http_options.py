"""What `http_options` change for an HTTP client, in both forms."""

import time
from pathlib import Path

import httpx
import pytest
from starlette.convertors import Convertor
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import mqserve as serve
from tests.instances import Deploy, new_name


class Stamp:
    """A middleware of the user's own: signs every answer."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app = app
        self.name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-stamp", self.name.encode())]
            await send(message)

        await self.app(scope, receive, stamped)


HTTP_OPTIONS = {
    "debug": True,
    "middlewares": [
        Middleware(CORSMiddleware, allow_origins=["https://example.org"], allow_methods=["GET"]),
        Middleware(Stamp, name="first"),
        Middleware(Stamp, name="second"),
    ],
}


def hello(request: serve.Request) -> str:
    return "hello"


def test_debug_shows_the_traceback_of_a_users_exception(deploy: Deploy) -> None:
    def fail(request: serve.Request) -> None:
        raise LookupError("no such digit")

    response = httpx.get(deploy.at(fail))
    assert (response.status_code, response.headers["content-type"]) == (500, "application/problem+json")
    assert "LookupError: no such digit" in response.json()["detail"] and "Traceback" in response.json()["detail"]


def test_a_cors_middleware_answers_a_preflight(deploy: Deploy) -> None:
    asked = {"origin": "https://example.org", "access-control-request-method": "GET"}
    response = httpx.options(deploy.at(hello), headers=asked)
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, "https://example.org")


def test_a_cors_middleware_marks_what_an_origin_may_read(deploy: Deploy) -> None:
    url = deploy.at(hello)
    allowed = httpx.get(url, headers={"origin": "https://example.org"})
    foreign = httpx.get(url, headers={"origin": "https://example.com"})
    assert allowed.headers["access-control-allow-origin"] == "https://example.org"
    assert "access-control-allow-origin" not in foreign.headers


def test_middlewares_wrap_one_another_the_first_outermost_and_the_system_paths_too(url: str) -> None:
    response = httpx.get(f"{url}/-/healthz")
    assert response.headers.get_list("x-stamp") == ["second", "first"]


class Unmakable(Stamp):
    def __init__(self, app: ASGIApp) -> None:
        raise LookupError("no such directory of users")


@pytest.mark.parametrize(
    ("unmakable", "says"),
    [("no.such:Middleware", "No module named 'no'"), (Middleware(Unmakable), "LookupError: no such directory of users")],
    ids=["no-module", "raises"],
)
def test_middlewares_that_cannot_be_made_are_undone_and_said_at_once(
    client: serve.Client, deploy: Deploy, unmakable: object, says: str
) -> None:
    began = time.monotonic()
    with pytest.raises(serve.BackendFailed, match=rf"which is undone: .*{says}"):
        client.set_middlewares([unmakable])
    assert time.monotonic() - began < 15, "long before proxies that say nothing are given up"
    assert httpx.get(deploy.at(hello)).headers.get_list("x-stamp") == ["second", "first"], "the proxies follow later routes"


def test_a_convertor_that_a_proxy_cannot_make_is_undone_and_said(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    made, name = tmp_path / "made", new_name("c").replace("-", "_")

    class MadeOnce(Convertor[str]):
        """Here, and nowhere else."""

        regex = "[a-z]+"

        def __init__(self) -> None:
            if made.exists():
                raise LookupError("made once already")
            made.touch()

    with pytest.raises(serve.BackendFailed, match=r"which is undone: .*made once already"):
        client.register_convertor(name, MadeOnce)
    with pytest.raises(ValueError, match="does not parse"):
        client.create_endpoint(new_name("e"), backend="any", route=f"/{{x:{name}}}")
    assert httpx.get(deploy.at(hello)).text == "hello"


def test_middlewares_are_a_list_and_not_the_letters_of_a_name(client: serve.Client) -> None:
    with pytest.raises(TypeError, match="middlewares must be a list"):
        client.set_middlewares("shop:Stamp")
