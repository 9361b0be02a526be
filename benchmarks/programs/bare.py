"""The baseline: the same handlers in bare Starlette, without a queue.

`app` has async handlers, `plain_app` a plain one under the same paths.
"""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route


async def async_noop(request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


def noop(request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


async def json(request: Request) -> JSONResponse:
    return JSONResponse(await request.json())


async def length(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


bodies = [Route("/json", json, methods=["POST"]), Route("/length", length, methods=["POST"])]
app = Starlette(routes=[Route("/noop", async_noop), Route("/async_noop", async_noop), *bodies])
plain_app = Starlette(routes=[Route("/noop", noop), Route("/async_noop", noop)])
