"""What tests/cost measures: an instance with no-ops, which sends requests of its own by a handle, as many as a line of its input says.

Prints `ready`, and `called` after each line. It ends with its input.
"""

import asyncio
import sys
from typing import Any

import mqserve as serve

IN_FLIGHT = 64


def plain(request: Any) -> str:
    return "ok"


async def coroutine(request: Any) -> str:
    return "ok"


async def call(handle: Any, count: int) -> None:
    numbers = iter(range(count))

    async def caller() -> None:
        for _ in numbers:
            assert await (await handle.remote()) == "ok"

    await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))


def main() -> None:
    client = serve.start(http_options={"port": int(sys.argv[1])})
    for handler in (plain, coroutine):
        name = handler.__name__
        client.create_backend(name, handler)
        client.create_endpoint(name, backend=name, route=f"/{name}")
    handle = client.get_handle("coroutine", sync=False)
    print("ready", flush=True)
    for line in sys.stdin:
        asyncio.run(call(handle, int(line)))
        print("called", flush=True)
    client.shutdown()


if __name__ == "__main__":
    main()
