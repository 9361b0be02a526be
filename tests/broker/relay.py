"""A wire to a server that a test can hold still or cut, without touching the server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from yarl import URL


class Relay:
    """Made by `relayed`: its `url` leads to the server as long as nothing is held or cut."""

    def __init__(self, url: str) -> None:
        self._server = URL(url)
        self._answers = asyncio.Event()  # set: what the server says is passed on
        self._answers.set()
        self._writers: list[asyncio.StreamWriter] = []
        self.url = ""

    def hold_answers(self) -> None:
        """The server hears everything, and is heard no more."""
        self._answers.clear()

    def cut(self) -> None:
        """All connections of this moment end; later ones are passed on as before."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        self._answers.set()

    async def listen(self) -> asyncio.Server:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.url = str(self._server.with_host("127.0.0.1").with_port(server.sockets[0].getsockname()[1]))
        return server

    async def _connect(self, client_reader: asyncio.StreamReader, client_writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(self._server.host, self._server.port)
        self._writers += (client_writer, server_writer)
        always = asyncio.Event()
        always.set()
        await asyncio.gather(pass_on(client_reader, server_writer, always), pass_on(server_reader, client_writer, self._answers))


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, when: asyncio.Event) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            await when.wait()
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


@asynccontextmanager
async def relayed(url: str) -> AsyncIterator[Relay]:
    relay = Relay(url)
    server = await relay.listen()
    try:
        yield relay
    finally:
        server.close()
        relay.cut()
