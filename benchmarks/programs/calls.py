"""Calls a no-op by its handle: of the instance that the environment names, or of one in this process where it names none."""

import os

import uvloop
from in_flight import Caller

import mqserve as serve


def noop(request):
    return "ok"


async def main():
    if "MQSERVE_BROKER_URL" in os.environ:
        client = serve.connect()
    else:
        client = serve.start(http_options={"location": None})
        client.create_backend("noop", noop)
        client.create_endpoint("noop", backend="noop")
    handle, async_handle = client.get_handle("noop"), client.get_handle("noop", sync=False)

    async def call():
        return await (await async_handle.remote())

    assert await call() == "ok"
    await Caller(begin=handle.remote, finish=lambda future: future.result(60), call=call).serve()


uvloop.run(main())
