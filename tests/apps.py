"""ASGI apps that tests serve: by the object, by import string and by factory, so this module is imported where they run."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Form, Request, Response, UploadFile
from litestar import Litestar
from litestar import get as litestar_get
from litestar import post as litestar_post
from litestar.connection import Request as LitestarRequest
from litestar.params import FromPath
from starlette.applications import Starlette
from starlette.requests import Request as StarletteRequest
from starlette.responses import JSONResponse
from starlette.routing import Route

import mqserve as serve
from tests.gates import Gate
from tests.tallies import Tally

CALLER: ContextVar[str] = ContextVar("CALLER", default="nobody")
LOADED: dict[str, str] = {}  # what the lifespan of `shop` has loaded


@asynccontextmanager
async def load(app: FastAPI) -> AsyncIterator[dict[str, str]]:
    LOADED["model"] = "loaded"
    yield {"model": LOADED["model"], "loop": str(id(asyncio.get_running_loop()))}
    LOADED.clear()


shop = FastAPI(lifespan=load)


def as_json(request: Request | StarletteRequest | LitestarRequest[Any, Any, Any]) -> dict[str, Any]:
    scope = request.scope
    return {
        "method": scope["method"],
        "path": scope["path"],
        "raw_path": scope["raw_path"].decode(),
        "root_path": scope["root_path"],
        "query": scope["query_string"].decode(),
    }


@shop.api_route("/where/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"], include_in_schema=False)
async def where(request: Request) -> dict[str, Any]:
    return as_json(request)


@shop.get("/items/{item_id}")
def item(item_id: int, wanted: int = 1) -> dict[str, int]:
    return {"item_id": item_id, "wanted": wanted}


@shop.get("/state")
async def state(request: Request) -> dict[str, Any]:
    request.state.model += "!"  # of this request only
    own_loop = request.state.loop == str(id(asyncio.get_running_loop()))
    return {"model": request.state.model, "own_loop": own_loop, "url": str(request.url_for("item", item_id=7))}


@shop.post("/files")
async def files(files: list[UploadFile], note: Annotated[str, Form()]) -> dict[str, Any]:
    return {"note": note, "sizes": {file.filename: len(await file.read()) for file in files}}


@shop.get("/login")
def login(request: Request, response: Response) -> dict[str, str]:
    response.set_cookie("user", "ada")
    response.set_cookie("theme", "dark")
    return dict(request.cookies)


def opened() -> Iterator[str]:
    yield f"connection of {CALLER.get()}"


@shop.get("/dependency")
def dependency(connection: Annotated[str, Depends(opened)]) -> str:
    return connection


@shop.get("/later")
def later(tally: str, tasks: BackgroundTasks) -> str:
    tasks.add_task(note, Path(tally), "after the answer")
    return "answered"


def note(path: Path, word: str) -> None:
    with path.open("a") as file:
        file.write(f"{word}\n")


@shop.get("/context")
async def context(caller: str) -> str:
    before = CALLER.get()
    CALLER.set(caller)
    return before


@shop.get("/broken")
def broken() -> None:
    raise LookupError("no such thing")


@shop.get("/thread")
def thread() -> dict[str, Any]:
    return {"ident": threading.get_native_id(), "tag": serve.get_replica_context().backend_tag, "pid": os.getpid()}


@shop.get("/page")
def page() -> Response:
    return Response("a page", headers={"x-page": "1"})


def behind(gate: Gate) -> FastAPI:
    """A factory: plain and async endpoints that wait at the gate."""
    app = FastAPI()

    @app.get("/plain")
    def plain() -> str:
        gate.pass_through("plain")
        return "plain"

    @app.get("/async")
    async def asynchronous() -> str:
        await gate.pass_through_async("async")
        return "async"

    @app.get("/free")
    def free() -> str:
        return "free"

    return app


def noting_its_end(tally: Tally) -> FastAPI:
    """A factory: an app whose one endpoint runs until it is cancelled."""
    app = FastAPI()

    @app.get("/")
    async def endless() -> None:
        tally.note("begins")
        try:
            await asyncio.sleep(3600)
        except BaseException as error:
            tally.note(type(error).__name__)
            raise

    return app


def telling(tally: Tally, fails: str = "") -> Any:
    """A factory: an app whose lifespan notes what it does, and fails in the way that is named."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tally.note("startup")
        if fails == "startup":
            raise ValueError("the model is not there")
        if fails == "hang":
            await asyncio.sleep(3600)
        if fails == "exit":
            raise SystemExit("the app gives up")
        yield
        tally.note("shutdown")
        if fails == "shutdown":
            raise ValueError("it does not close")

    app = FastAPI(lifespan=lifespan)

    @app.get("/hello")
    def hello() -> str:
        tally.note("request")
        return "hello"

    return app


# The same in other frameworks, and in none.


async def starlette_where(request: StarletteRequest) -> JSONResponse:
    return JSONResponse(as_json(request))


def starlette_hello(request: StarletteRequest) -> JSONResponse:
    return JSONResponse({"hello": request.path_params["name"]})


starlette_app = Starlette(
    routes=[Route("/where/{rest:path}", starlette_where, methods=["GET", "POST"]), Route("/hello/{name}", starlette_hello)]
)


@litestar_get("/where/{rest:path}")
async def litestar_where(request: LitestarRequest[Any, Any, Any], rest: FromPath[str]) -> dict[str, Any]:
    return as_json(request)


@litestar_post("/where/{rest:path}", status_code=200)
async def litestar_posted(request: LitestarRequest[Any, Any, Any], rest: FromPath[str]) -> dict[str, Any]:
    return as_json(request)


@litestar_get("/hello/{name:str}", sync_to_thread=True)
def litestar_hello(name: FromPath[str]) -> dict[str, str]:
    return {"hello": name}


litestar_app = Litestar([litestar_where, litestar_posted, litestar_hello])


async def plain_app(scope: Any, receive: Any, send: Any) -> None:
    """It knows no lifespan, and raises when it is asked for one."""
    assert scope["type"] == "http"
    inside = scope["path"].removeprefix(scope["root_path"])
    if inside.startswith("/hello/"):
        body = b'{"hello":"%s"}' % inside.removeprefix("/hello/").encode()
    else:
        body = bytes(JSONResponse(as_json(StarletteRequest(scope))).body)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


class Answering:
    """An app of no framework, as an object: it returns at once when it is asked for a lifespan."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await plain_app(scope, receive, send)


answering = Answering()


async def refusing(scope: Any, receive: Any, send: Any) -> None:
    """It says in the protocol's words that it does not start, and raises nothing."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "the shelves are empty"})


async def silent(scope: Any, receive: Any, send: Any) -> None:
    """It returns without an answer."""


# A class whose methods are routes.

api = FastAPI()
parts = APIRouter(prefix="/parts")


@serve.ingress(api)
class Multiplier:
    def __init__(self, factor: int = 2) -> None:
        self.factor = factor
        self.calls = 0

    def reconfigure(self, config: dict[str, int]) -> None:
        self.factor = config["factor"]

    @api.get("/times/{number}")
    def times(self, number: int, more: int = 0) -> dict[str, int]:
        """Multiplies a number."""
        self.calls += 1
        return {"product": number * self.factor + more, "calls": self.calls}

    @api.post("/times")
    async def times_posted(self, numbers: list[int]) -> list[int]:
        return [number * self.factor for number in numbers]

    @parts.get("/half/{number}")
    def half(self, number: int) -> float:
        return number * self.factor / 2

    @api.get("/factor")
    def get_factor(self, connection: Annotated[str, Depends(opened)]) -> int:
        return self.factor


api.include_router(parts)


@api.get("/outside/{number}")
def outside(number: int) -> int:
    return number
