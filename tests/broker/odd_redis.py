"""A Redis that says what a test wants: it takes connections and logins as the real one does, and answers the rest from a table."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import hiredis

GREETINGS = {"HELLO": b"%1\r\n+proto\r\n:3\r\n", "PING": b"+PONG\r\n", "TIME": b"*2\r\n$10\r\n1700000000\r\n$1\r\n0\r\n"}


class OddRedis:
    """`answers[command]` are the next answers to it, the last of them for good; a command that is not there gets `+OK`."""

    def __init__(self) -> None:
        self.answers: defaultdict[str, list[bytes]] = defaultdict(lambda: [b"+OK\r\n"])
        self.answers.update({command: [answer] for command, answer in GREETINGS.items()})
        self.heard: list[str] = []
        self.url = ""
        self._writers: set[asyncio.StreamWriter] = set()

    def __repr__(self) -> str:
        return f"<OddRedis {self.url}, {len(self._writers)} connections>"

    def say_to_all(self, words: bytes) -> None:
        """What nobody asked for."""
        for writer in self._writers:
            writer.write(words)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        commands = hiredis.Reader(notEnoughData=...)
        self._writers.add(writer)
        with suppress(OSError):
            while data := await reader.read(65536):
                commands.feed(data)
                while (command := commands.gets()) is not ...:
                    name = command[0].decode()
                    self.heard.append(name)
                    answers = self.answers[name]
                    writer.write(answers.pop(0) if len(answers) > 1 else answers[0])
        self._writers.discard(writer)
        writer.close()


@asynccontextmanager
async def odd_redis() -> AsyncIterator[OddRedis]:
    redis = OddRedis()
    server = await asyncio.start_server(redis.serve, "127.0.0.1", 0)
    redis.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    try:
        yield redis
    finally:
        server.close()
        for writer in list(redis._writers):
            writer.transport.abort()
        await server.wait_closed()
