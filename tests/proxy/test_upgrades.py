"""The connection of one WebSocket session, without a network."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from mqserve.proxy.upgrades import WebSocketProtocol

pytestmark = pytest.mark.anyio


class Wire(asyncio.Transport):
    """What the client would read."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.protocol: Any = None
        self._is_closed = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def is_closing(self) -> bool:
        return self._is_closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close


async def test_the_app_hears_that_a_client_without_pongs_has_gone_without_a_close() -> None:
    heard: list[Any] = []
    has_ended = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        while not heard or heard[-1]["type"] != "websocket.disconnect":
            heard.append(await receive())
        has_ended.set()

    config = uvicorn.Config(app, lifespan="off", ws_ping_interval=0.01, ws_ping_timeout=0.01)
    config.load()
    edge: Any = SimpleNamespace(config=config, server_state=ServerState(), app_state={})
    protocol, wire = WebSocketProtocol(edge), Wire()
    headers = [(b"host", b"a"), (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="), (b"sec-websocket-version", b"13")]
    protocol.begin(wire, b"/", headers, "http", None)
    async with asyncio.timeout(20):
        await has_ended.wait()
    assert wire.written.startswith(b"HTTP/1.1 101") and b"keepalive ping timeout" in wire.written
    assert heard[-1] == {"type": "websocket.disconnect", "code": 1006, "reason": ""}
