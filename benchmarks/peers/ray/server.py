"""Ray Serve: python server.py PORT noop|bodies|streaming, which are the paths it serves. The environment says whether it is tuned: then a
replica also takes as many requests at once as one of ours, and writes no access log."""

import asyncio
import os
import signal
import sys
import time

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

CHUNKS, CHUNK = 1000, "." * 31 + "~"
PACED_CHUNKS, PACE_S = 20, 0.005
OPTIONS = {"ray_actor_options": {"num_cpus": 0}}  # two cores carry its two deployments, too
if os.environ.get("RAY_SERVE_THROUGHPUT_OPTIMIZED"):
    OPTIONS |= {"max_ongoing_requests": 100, "logging_config": {"enable_access_log": False}}


@serve.deployment(**OPTIONS)
async def async_noop(request: Request):
    return "ok"


@serve.deployment(**OPTIONS)
def noop(request: Request):
    return "ok"


@serve.deployment(**OPTIONS)
async def json(request: Request):
    return await request.json()


@serve.deployment(**OPTIONS)
async def length(request: Request):
    return str(len(await request.body()))


def fast_chunks():
    for _ in range(CHUNKS):
        yield CHUNK


async def async_fast_chunks():
    for _ in range(CHUNKS):
        yield CHUNK


async def paced_chunks():
    for _ in range(PACED_CHUNKS):
        yield f"{time.monotonic():.6f}~"
        await asyncio.sleep(PACE_S)


@serve.deployment(**OPTIONS)
async def fast(request: Request):
    return StreamingResponse(fast_chunks(), media_type="text/plain")


@serve.deployment(**OPTIONS)
async def async_fast(request: Request):
    return StreamingResponse(async_fast_chunks(), media_type="text/plain")


@serve.deployment(**OPTIONS)
async def async_paced(request: Request):
    return StreamingResponse(paced_chunks(), media_type="text/plain")


HANDLERS = {"noop": (async_noop, noop), "bodies": (json, length), "streaming": (fast, async_fast, async_paced)}

port, kind = sys.argv[1:]
ray.init(include_dashboard=False)
serve.start(http_options={"port": int(port)})
for handler in HANDLERS[kind]:
    serve.run(handler.bind(), name=handler.name, route_prefix=f"/{handler.name}")
signal.signal(signal.SIGINT, lambda *_: sys.exit(serve.shutdown()))
signal.pause()
