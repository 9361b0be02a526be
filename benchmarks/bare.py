"""The baseline: the same no-op in bare Starlette, without a queue."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route


async def noop(request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


app = Starlette(routes=[Route("/noop", noop), Route("/async_noop", noop)])
