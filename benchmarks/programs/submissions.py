"""Submits jobs by a handle of the instance that the environment names: each call ends once the job is confirmed and has its record."""

import uvloop
from in_flight import Caller

import mqserve as serve


async def main():
    client = serve.connect()
    handle, async_handle = client.get_handle("noop"), client.get_handle("noop", sync=False)
    assert await (await async_handle.submit()) == "ok"
    await Caller(begin=handle.submit, finish=lambda job: None, call=async_handle.submit).serve()


uvloop.run(main())
