"""Calls the task of server.py. Taskiq waits for results in coroutines alone, and asks Redis over and over: here every 5 ms, not 200."""

import uvloop
from in_flight import Caller
from server import broker, noop


async def call():
    task = await noop.kiq()
    return (await task.wait_result(check_interval=0.005, timeout=60)).return_value


async def main():
    await broker.startup()
    assert await call() == "ok"
    await Caller(call=call).serve()
    await broker.shutdown()


uvloop.run(main())
