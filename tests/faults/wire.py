"""A TCP wire to a server, that a test can slow down, hold still, cut or lead elsewhere, without touching the server.

It runs in a thread with a loop of its own: plain and async tests use it alike, and the processes they start.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from yarl import URL


class Wire:
    """Use as a context manager: `url` leads to the server as long as nothing is done to the wire.

    What is done holds for the connections there are and for later ones, until `mend`; but for the three that end
    connections (`reset`, `finish`, `half_close`), which end those of the moment.
    """

    def __init__(self, url: str, host: str = "127.0.0.1") -> None:
        self._server = URL(url)
        self._host = host
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"wire to {self._server.port}", daemon=True)
        self._up = Direction()  # what clients say
        self._down = Direction()  # what the server says
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    def __repr__(self) -> str:
        return f"<Wire {self.url}, {len(self._pairs)} connections, up {self._up}, down {self._down}>"

    def __enter__(self) -> Self:
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.url = str(self._server.with_host(self._host).with_port(port))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def connections(self) -> int:
        return len(self._pairs)

    def delay(self, seconds: float) -> None:
        """Whatever is sent, either way, arrives so much later: latency, not less bandwidth."""
        self._up.delay_s = self._down.delay_s = seconds

    def hold_answers(self) -> None:
        """The server hears everything, and is heard no more."""
        self._down.open.clear()

    def blackhole(self) -> None:
        """Nothing gets through either way, and nobody is told; new connections are taken, and hear nothing."""
        self._up.open.clear()
        self._down.open.clear()

    def strand(self) -> None:
        """The connections of this moment fall silent both ways for good, and nobody is told; new ones are passed on."""

        def strand() -> None:
            self._up.open.clear()
            self._down.open.clear()
            self._up, self._down = Direction(), Direction()

        self._do(strand)

    def drop_after(self, number_of_bytes: int) -> None:
        """Clients may say so many bytes more, all together; then their connections are reset."""
        self._up.bytes_left = number_of_bytes

    def refuse(self) -> None:
        """New connections are reset as soon as they are made."""
        self._up.bytes_left = 0

    def mend(self) -> None:
        """Whatever was done: what was held goes on its way, and new connections are passed on."""
        self._do(self._up.mend)
        self._do(self._down.mend)

    def lead_to(self, url: str) -> None:
        """New connections go to another server; those of the moment stay where they are."""
        self._server = URL(url)

    def reset(self) -> None:
        """RST to both ends of every connection of this moment."""
        self._do_to_each(_Pair.reset)

    def reset_clients(self) -> None:
        """RST to the clients of this moment; the server is not told."""

        def reset_clients() -> None:
            self._up.open.clear()
            self._up = Direction()
            for pair in list(self._pairs):
                pair.reset_client()

        self._do(reset_clients)

    def finish(self) -> None:
        """FIN to both ends of every connection of this moment."""
        self._do_to_each(_Pair.finish)

    def half_close(self) -> None:
        """FIN to the clients of this moment; what they say goes on to the server."""
        self._do_to_each(_Pair.half_close)

    def _do(self, act: Callable[[], None]) -> None:
        """In the wire's own thread, and done when this returns."""

        async def run() -> None:
            act()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def _do_to_each(self, act: Callable[["_Pair"], None]) -> None:
        def do() -> None:
            for pair in list(self._pairs):
                act(pair)

        self._do(do)

    async def _listen(self) -> int:
        self._listener = await asyncio.start_server(self._connect, self._host, 0)
        port: int = self._listener.sockets[0].getsockname()[1]
        return port

    async def _connect(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._up.bytes_left == 0:
            return reset(to_client)
        try:
            from_server, to_server = await asyncio.open_connection(self._server.host, self._server.port)
        except OSError:
            return reset(to_client)
        pair = _Pair(to_client, to_server)
        self._pairs.add(pair)
        passing = asyncio.gather(
            self._up.pass_on(from_client, to_server, pair.reset), self._down.pass_on(from_server, to_client, pair.reset)
        )
        passing.add_done_callback(lambda _: pair.ended.set())
        try:
            await pair.ended.wait()
        finally:
            passing.cancel()
            await asyncio.gather(passing, return_exceptions=True)
            self._pairs.discard(pair)
            pair.finish()

    async def _close(self) -> None:
        self._listener.close()
        for pair in list(self._pairs):
            pair.reset()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Direction:
    """One way of a wire."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.mend()

    def __repr__(self) -> str:
        return f"{'open' if self.open.is_set() else 'held'} with {self.delay_s:g} s"

    def mend(self) -> None:
        self.open.set()
        self.delay_s = 0.0
        self.bytes_left: int | None = None

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, end: Callable[[], None]) -> None:
        """Until one side ends; then the other is told, after what is under way."""
        loop = asyncio.get_running_loop()
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

        async def deliver() -> None:
            while True:
                due, data = await under_way.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                await self.open.wait()
                if not data:
                    return writer.close()
                writer.write(data)
                await writer.drain()

        delivering = asyncio.create_task(deliver())
        try:
            while not delivering.done():
                data = await reader.read(65536)
                if self.bytes_left is not None:
                    data, self.bytes_left = data[: self.bytes_left], max(0, self.bytes_left - len(data))
                    if not self.bytes_left:
                        return end()
                await under_way.put((loop.time() + self.delay_s, data))
                if not data:
                    await delivering
        except OSError:
            await self.open.wait()  # what is held, is held back from the other side too
            end()
        except RuntimeError:
            pass  # the half that was closed: what is still said there is lost
        finally:
            delivering.cancel()


class _Pair:
    """One connection: its two sockets."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self._writers = writers
        self.ended = asyncio.Event()

    def reset(self) -> None:
        for writer in self._writers:
            reset(writer)
        self.ended.set()

    def reset_client(self) -> None:
        reset(self._writers[0])

    def finish(self) -> None:
        for writer in self._writers:
            writer.close()
        self.ended.set()

    def half_close(self) -> None:
        self._writers[0].write_eof()


def reset(writer: asyncio.StreamWriter) -> None:
    """RST rather than FIN: the socket does not linger."""
    connection = writer.get_extra_info("socket")
    if connection is not None and not writer.transport.is_closing():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
