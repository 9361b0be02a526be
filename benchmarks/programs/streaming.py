"""Handlers that stream: as fast as they can, and a chunk every 5 ms that says when it was made."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import mqserve as serve

CHUNKS, CHUNK = 1000, "." * 31 + "~"
PACED_CHUNKS, PACE_S = 20, 0.005


@serve.endpoint("/fast")
def fast(request: serve.Request) -> Iterator[str]:
    for _ in range(CHUNKS):
        yield CHUNK


@serve.endpoint("/async_fast")
async def async_fast(request: serve.Request) -> AsyncIterator[str]:
    for _ in range(CHUNKS):
        yield CHUNK


@serve.endpoint("/async_paced")
async def async_paced(request: serve.Request) -> AsyncIterator[str]:
    for _ in range(PACED_CHUNKS):
        yield f"{time.monotonic():.6f}~"
        await asyncio.sleep(PACE_S)
