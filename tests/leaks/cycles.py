"""`python -m tests.leaks.cycles KIND COUNT [NAME PID FILE]…` goes through as many cycles, and says now and then what was kept, by this
process and by those others (which run `traced.py`): a line `cycle, name, traced bytes, resident bytes` for each.

start      an instance is started, serves a request and is shut down
deploy     a backend and an endpoint come, serve a request and go
endpoint   an endpoint comes, is called over HTTP, and goes
update     a backend gets new code

Without URLs in the environment the instance is embedded. With them the program joins the one that runs, and is its node: replicas
that are tasks come and go a hundred times more quickly than processes.
"""

import asyncio
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvloop

import mqserve as serve
from mqserve.broker.process.lifeline import Stop
from mqserve.broker.settings import Settings
from mqserve.connections import open_connections
from mqserve.controller.machine_resources import measure_node
from mqserve.controller.node import Node, NodeOptions
from mqserve.instance.embedded import EmbeddedLauncher
from tests.instances import wait_until
from tests.leaks.traced import kept_by, kept_here

SAID_EVERY = 10
Cycle = Callable[[int], None]


def greet(request: Any) -> str:
    return "hello"


def make_counter(number: int) -> Any:
    class Counter:
        def __call__(self, request: Any) -> int:
            return number

    return Counter


def start(number: int) -> None:
    if Settings.read().embedded:
        with serve.start(http_options={"port": 0}) as client:
            deploy(client)(number)
    else:
        with serve.start(http_options={"location": None}):
            pass  # its node is a process, and so would its replicas be


def deploy(client: serve.Client) -> Cycle:
    def cycle(number: int) -> None:
        name = f"backend-{number}"
        client.create_backend(name, greet)
        client.create_endpoint(name, backend=name, route=f"/{name}")
        assert httpx.get(f"{client.http_url()}/{name}", timeout=30).text == "hello"
        client.delete_endpoint(name)
        client.delete_backend(name, force=client.owns and number % 2 == 0)  # a replica that is a task of this program cannot be killed

    return cycle


def endpoint(client: serve.Client) -> Cycle:
    client.create_backend("backend", greet)

    def cycle(number: int) -> None:
        name = f"endpoint-{number}"
        client.create_endpoint(name, backend="backend", route=f"/{name}/{{word}}")
        assert httpx.get(f"{client.http_url()}/{name}/x", timeout=30).text == "hello"
        client.delete_endpoint(name)

    return cycle


def update(client: serve.Client) -> Cycle:
    counters = [make_counter(number) for number in range(20)]  # not one for each cycle: the store keeps code for an hour
    client.create_backend("backend", greet)

    def cycle(number: int) -> None:
        client.update_backend("backend", counters[number % len(counters)])

    return cycle


@contextmanager
def instance() -> Iterator[serve.Client]:
    if Settings.read().embedded:
        with serve.start(http_options={"port": 0}) as client:
            yield client
    else:
        with node_in_a_thread(), join() as client:
            wait_until(client.http_url)
            yield client


def join() -> serve.Client:
    """Once the instance is up."""

    def is_up() -> bool:
        try:
            return bool(serve.connect())
        except serve.InstanceError:
            return False

    wait_until(is_up)
    return serve.connect()


@contextmanager
def node_in_a_thread() -> Iterator[None]:
    started = threading.Event()
    stopping: list[Callable[[], object]] = []

    async def run() -> None:
        loop, stopped = asyncio.get_running_loop(), Stop()
        stopping.append(lambda: loop.call_soon_threadsafe(stopped.set))
        async with open_connections(Settings.read(), "node") as connections:
            started.set()
            options = NodeOptions("node", capacity=measure_node(None, None, {}))
            await Node(options, connections.store, connections.keys, EmbeddedLauncher(connections), connections.settings.signer).run(
                stopped
            )

    thread = threading.Thread(target=lambda: uvloop.run(run()), daemon=True)
    thread.start()
    try:
        assert started.wait(30)
        yield
    finally:
        for stop in stopping:
            stop()
        thread.join(60)


def go_through(cycle: Cycle, count: int, others: dict[str, tuple[int, Path]]) -> None:
    for number in range(1, count + 1):
        cycle(number)
        if number % SAID_EVERY == 0:
            kept = {"here": kept_here()} | {name: kept_by(pid, file) for name, (pid, file) in others.items()}
            for name, (traced, resident) in kept.items():
                print(number, name, traced, resident, flush=True)


if __name__ == "__main__":
    kind, count, *rest = sys.argv[1:]
    others = {name: (int(pid), Path(file)) for name, pid, file in zip(rest[::3], rest[1::3], rest[2::3], strict=True)}
    tracemalloc.start()
    if kind == "start":
        go_through(start, int(count), others)
    else:
        with instance() as client:
            go_through({"deploy": deploy, "endpoint": endpoint, "update": update}[kind](client), int(count), others)
