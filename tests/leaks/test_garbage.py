"""A request leaves no cyclic garbage in an instance's process: reference counts free what it used. What they leave is freed by the cycle
collector, which stops all threads for as long as it looks at every object."""

import asyncio
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from websockets.asyncio.client import connect

import mqserve as serve
from mqserve.broker.errors import Overloaded
from mqserve.broker.memory.queue import EmbeddedQueue
from tests import socket_apps
from tests.bare_http import wire
from tests.instances import Deploy, started

REQUESTS = 200
SESSIONS = 20
OF_A_CLIENT = 7  # its transport, which is one of asyncio, and what that refers to


@pytest.fixture(scope="module")
def client() -> Iterator[serve.Client]:
    with started() as client:
        yield client


def plain() -> Any:
    return lambda request: "done"


def asynchronous() -> Any:
    async def handler(request: Any) -> str:
        await asyncio.sleep(0)
        return "done"

    return handler


def batched() -> Any:
    @serve.accept_batch
    async def handler(requests: list[Any]) -> list[str]:
        return ["done"] * len(requests)

    return handler


each_kind = pytest.mark.parametrize("make", [plain, asynchronous, batched])


def garbage_of(send_all: Callable[[], None]) -> int:
    """Returns the number of objects that only the cycle collector can free: the least of three, since heartbeats leave some, too."""
    send_all()  # what is made once in a process
    found: list[int] = []
    gc.disable()
    try:
        for _ in range(3):
            gc.collect()
            send_all()
            found.append(gc.collect())
    finally:
        gc.enable()
    return min(found)


@each_kind
def test_a_request_by_a_handle_leaves_no_cyclic_garbage(client: serve.Client, make: Callable[[], Any]) -> None:
    deploy = Deploy(client)
    handle = client.get_handle(deploy(make()))

    def send_all() -> None:
        refs = [handle.remote(number) for number in range(REQUESTS)]
        assert serve.get(refs, timeout=30) == ["done"] * REQUESTS

    assert garbage_of(send_all) < REQUESTS
    deploy.undo()


@each_kind
def test_a_request_by_http_leaves_no_cyclic_garbage(client: serve.Client, make: Callable[[], Any]) -> None:
    deploy = Deploy(client)
    route = deploy.at(make()).removeprefix(deploy.url)
    with wire(deploy.url) as connection:

        def send_all() -> None:
            for _ in range(REQUESTS):
                connection.send(f"GET {route} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
                answer = connection.answer()
                assert answer is not None and answer.body == b"done"

        assert garbage_of(send_all) < REQUESTS
    deploy.undo()


@pytest.mark.parametrize("is_refused", [False, True], ids=["accepted", "refused"])
@pytest.mark.parametrize("prefer", ["respond-async", "respond-async, wait=0"], ids=["by callbacks", "by a task"])
def test_a_job_by_http_leaves_no_cyclic_garbage(
    client: serve.Client, prefer: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy = Deploy(client)
    route = deploy.at(plain()).removeprefix(deploy.url)
    if is_refused:
        refuse: Any = lambda queue, backend, envelope, settled: settled(Overloaded("full"))  # noqa: E731
        monkeypatch.setattr(EmbeddedQueue, "publish_job", refuse)
    with wire(deploy.url) as connection:

        def send_all() -> None:
            for _ in range(REQUESTS):
                connection.send(f"GET {route} HTTP/1.1\r\nhost: x\r\nprefer: {prefer}\r\n\r\n".encode())
                answer = connection.answer()
                assert answer is not None and answer.status == (429 if is_refused else 202)

        assert garbage_of(send_all) < REQUESTS
    monkeypatch.undo()
    deploy.undo()


def test_a_websocket_session_leaves_no_cyclic_garbage(client: serve.Client) -> None:
    client.mount("/ws", socket_apps.app)
    url = client.http_url().replace("http", "ws", 1) + "/ws/echo"

    async def talk() -> None:
        async with connect(url) as socket:
            await socket.send("here")
            await socket.recv()

    async def talk_all() -> None:
        await asyncio.gather(*(talk() for _ in range(SESSIONS)))

    def send_all() -> None:
        asyncio.run(talk_all())

    left = garbage_of(send_all)
    client.delete_endpoint("ws")
    client.delete_backend("ws")
    assert left <= OF_A_CLIENT * SESSIONS
