"""The baseline: the same handlers in bare Starlette, without a queue.

`app` has async handlers, `plain_app` a plain one under the same paths.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

CHUNKS, CHUNK = 1000, "." * 31 + "~"
PACED_CHUNKS, PACE_S = 20, 0.005


async def async_noop(request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


def noop(request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


async def json(request: Request) -> JSONResponse:
    return JSONResponse(await request.json())


async def length(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


def fast_chunks() -> Iterator[str]:
    for _ in range(CHUNKS):
        yield CHUNK


async def async_fast_chunks() -> AsyncIterator[str]:
    for _ in range(CHUNKS):
        yield CHUNK


async def paced_chunks() -> AsyncIterator[str]:
    for _ in range(PACED_CHUNKS):
        yield f"{time.monotonic():.6f}~"
        await asyncio.sleep(PACE_S)


async def fast(request: Request) -> StreamingResponse:
    return StreamingResponse(fast_chunks())


async def async_fast(request: Request) -> StreamingResponse:
    return StreamingResponse(async_fast_chunks())


async def async_paced(request: Request) -> StreamingResponse:
    return StreamingResponse(paced_chunks())


bodies = [Route("/json", json, methods=["POST"]), Route("/length", length, methods=["POST"])]
streams = [Route("/fast", fast), Route("/async_fast", async_fast), Route("/async_paced", async_paced)]
app = Starlette(routes=[Route("/noop", async_noop), Route("/async_noop", async_noop), *bodies, *streams])
plain_app = Starlette(routes=[Route("/noop", noop), Route("/async_noop", noop)])
