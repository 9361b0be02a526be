"""ASGI apps with WebSockets that tests serve: this module is imported where they run."""

import asyncio
import os
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import WebSocketRoute

import mqserve as serve

CHUNK = "x" * 60_000
_FROM_HERE = [(b"x-from", b"the app"), (b"x-process", b"%d" % os.getpid())]


def note(tally: str, word: str) -> None:
    """Appends to the tally at this path."""
    with Path(tally).open("a") as file:
        file.write(f"{word}\n")


async def opened(gate: str) -> None:
    """Returns when there is a file at this path."""
    while not os.path.exists(gate):  # noqa: ASYNC240  # it takes no time
        await asyncio.sleep(0.005)


app = FastAPI()


@app.get("/plain")
async def plain() -> str:
    return "plain"


@app.get("/tasks")
async def tasks() -> dict[str, int]:
    """Which process answers, and how many tasks its user's loop has."""
    return {"pid": os.getpid(), "tasks": len(asyncio.all_tasks())}


@app.websocket("/echo")
async def echo(socket: WebSocket) -> None:
    offered = socket.scope["subprotocols"]
    await socket.accept(subprotocol=offered[0] if offered else None, headers=[*_FROM_HERE, (b"connection", b"close")])
    while (said := await socket.receive())["type"] == "websocket.receive":
        await socket.send({**said, "type": "websocket.send"})


@app.websocket("/scope/{number}")
async def scope(socket: WebSocket, number: int) -> None:
    await socket.accept()
    found = {name: socket.scope[name] for name in ("type", "scheme", "path", "root_path", "http_version")}
    query, header = socket.scope["query_string"].decode(), socket.headers.get("x-mine")
    await socket.send_json({**found, "number": number, "query": query, "header": header, "url": str(socket.url)})
    await socket.close()


@app.websocket("/refused")
async def refused(socket: WebSocket) -> None:
    await socket.close()


@app.websocket("/denied")
async def denied(socket: WebSocket) -> None:
    await socket.send_denial_response(JSONResponse({"why": "no ticket"}, 401, headers={"www-authenticate": "Ticket"}))


@app.websocket("/closes")
async def closes(socket: WebSocket, code: int, reason: str = "") -> None:
    await socket.accept()
    await socket.send_text("before")
    await socket.close(code, reason)


@app.websocket("/chooses")
async def chooses(socket: WebSocket, subprotocol: str) -> None:
    await socket.accept(subprotocol)


@app.websocket("/raises")
async def raises(socket: WebSocket) -> None:
    await socket.accept()
    raise LookupError("no such thing")


@app.websocket("/raises-early")
async def raises_early(socket: WebSocket) -> None:
    raise LookupError("no such thing")


@app.websocket("/returns")
async def returns(socket: WebSocket) -> None:
    await socket.accept()


@app.websocket("/forgets")
async def forgets(socket: WebSocket) -> None:
    pass


@app.websocket("/hears")
async def hears(socket: WebSocket, tally: str) -> None:
    """Notes all that it hears, and how it ends."""
    await socket.accept()
    try:
        while True:
            note(tally, await socket.receive_text())
    except WebSocketDisconnect as end:
        note(tally, f"{end.code} {end.reason}")


@app.websocket("/late")
async def late(socket: WebSocket, gate: str, tally: str) -> None:
    """Accepts when the gate opens."""
    note(tally, "asked")
    try:
        await opened(gate)
        await socket.accept()
    except asyncio.CancelledError:
        note(tally, "cancelled")
        raise


@app.websocket("/blocks")
async def blocks(socket: WebSocket, gate: str) -> None:
    """Blocks the loop of its replica until the gate opens."""
    await socket.accept()
    await socket.receive_text()
    while not os.path.exists(gate):  # noqa: ASYNC240
        time.sleep(0.005)  # noqa: ASYNC251


@app.websocket("/pours")
async def pours(socket: WebSocket, tally: str, count: int) -> None:
    """Sends as fast as it may."""
    await socket.accept()
    try:
        for number in range(count):
            await socket.send_text(f"{number} {CHUNK}")
            note(tally, str(number))
    except WebSocketDisconnect as end:
        note(tally, f"left {end.code}")


@app.websocket("/slow")
async def slow(socket: WebSocket, gate: str) -> None:
    """Reads when the gate opens, and says how many characters it got."""
    await socket.accept()
    await opened(gate)
    size = 0
    while (said := await socket.receive_text()) != "end":
        size += len(said)
    await socket.send_text(str(size))


async def _starlette_echo(socket: WebSocket) -> None:
    await socket.accept()
    async for said in socket.iter_text():
        await socket.send_text(said)


starlette_app = Starlette(routes=[WebSocketRoute("/echo", _starlette_echo)])

_counted = FastAPI()


def _greeting() -> str:
    return "hello"


@serve.ingress(_counted)
class Counter:
    """Counts what its sessions say, together."""

    def __init__(self) -> None:
        self.count = 0

    @_counted.websocket("/count")
    async def say(self, socket: WebSocket, greeting: Annotated[str, Depends(_greeting)]) -> None:
        await socket.accept()
        async for _ in socket.iter_text():
            self.count += 1
            await socket.send_text(f"{greeting} {self.count}")


async def plain_app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """ASGI as it is: says what it got for sending after its own close."""
    if scope["type"] != "websocket":
        return
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "bytes": b"one"})
    await send({"type": "websocket.close", "code": 3001, "reason": "done"})
    ended = await receive()
    try:
        await send({"type": "websocket.send", "text": "two"})
    except RuntimeError as error:
        note(scope["query_string"].decode(), f"{ended['type']} {ended['code']} {error}")


class Chokes:
    """A middleware that fails on what some clients say."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        async def checked() -> Any:
            message = await receive()
            if message.get("text") == "choke":
                raise LookupError("the middleware chokes")
            return message

        await self._app(scope, checked, send)
