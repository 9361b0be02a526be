"""Ray Serve: python server.py PORT noop|bodies, which are the paths it serves. The environment says whether it is tuned: then a
replica also takes as many requests at once as one of ours, and writes no access log."""

import os
import signal
import sys

import ray
from ray import serve
from starlette.requests import Request

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


HANDLERS = {"noop": (async_noop, noop), "bodies": (json, length)}

port, kind = sys.argv[1:]
ray.init(include_dashboard=False)
serve.start(http_options={"port": int(port)})
for handler in HANDLERS[kind]:
    serve.run(handler.bind(), name=handler.name, route_prefix=f"/{handler.name}")
signal.signal(signal.SIGINT, lambda *_: sys.exit(serve.shutdown()))
signal.pause()
