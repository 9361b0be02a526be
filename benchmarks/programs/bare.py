"""The baseline: the same no-op in bare Starlette, without a queue.

Both paths have an async handler in `app`, a plain one in `plain_app`.
"""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route


async def async_noop(request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


def noop(request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


app = Starlette(routes=[Route("/noop", async_noop), Route("/async_noop", async_noop)])
plain_app = Starlette(routes=[Route("/noop", noop), Route("/async_noop", noop)])
