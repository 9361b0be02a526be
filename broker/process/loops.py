"""Our event loops: uvloop, made safe for programs that fork."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
from typing import Any

import uvloop

from . import forks


class WorkerLoop(uvloop.Loop):
    """The event loop of threads that run user code. A forked child shares its parent's epoll: what it does to its copy of a loop changes
    the parent's, and it could take the parent's events. So a child's copy gets an empty epoll."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = 0  # ident of the running thread, 0 if stopped
        self._poll_once()
        forks.mend_in_children(self)

    def _poll_once(self) -> None:
        """Polls once, so that libuv registers its wake-up descriptors now. It registers them at the first poll; in the child of a loop
        that never polled, they would go into the child's epoll, and the child would take wake-ups of the parent."""
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        try:
            self.call_soon(self.stop)
            super().run_forever()
        finally:
            asyncio._set_running_loop(outer)

    def run_forever(self) -> None:
        self._thread = threading.get_ident()
        try:
            super().run_forever()
        finally:
            self._thread = 0

    def after_fork(self) -> None:
        if self.is_closed():
            return
        _renew_epoll(self._get_backend_id())  # type: ignore[attr-defined]
        if self._thread == threading.get_ident():
            self.call_soon(forks.end_child)  # a child whose code returns to this loop, or awaits, ends


def _renew_epoll(fd: int) -> None:
    if hasattr(select, "epoll"):  # elsewhere a child does not inherit it
        with select.epoll() as empty:
            os.dup2(empty.fileno(), fd, inheritable=False)


class IoLoop(WorkerLoop):
    """The event loop of threads that run only our code. It creates the sockets of its connections itself, so that they are registered
    from the start: sockets that libuv makes become known only once they are connected."""

    async def create_connection(
        self, protocol_factory: Any, host: Any = None, port: Any = None, *,
        sock: socket.socket | None = None, ssl: Any = None, server_hostname: str | None = None,
        family: int = 0, proto: int = 0, flags: int = 0, local_addr: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        if sock is not None:
            return await super().create_connection(protocol_factory, sock=sock, ssl=ssl, server_hostname=server_hostname, **options)
        addresses = await self.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM, proto=proto, flags=flags)
        sock = await self._connect(addresses, local_addr)
        try:
            name = (server_hostname or host) if ssl else server_hostname
            return await super().create_connection(protocol_factory, sock=sock, ssl=ssl, server_hostname=name, **options)
        except BaseException:
            _close_if_open(sock)
            raise

    async def _connect(self, addresses: Any, local_addr: Any) -> socket.socket:
        """Connects to the first address that accepts. Raises OSError; after several failures it holds all their messages."""
        failures: list[OSError] = []
        for family, kind, proto, _, address in addresses:
            sock = forks.guarded_socket(family, kind, proto)
            try:
                sock.setblocking(False)
                if local_addr is not None:
                    sock.bind(local_addr)
                await self._until_connected(sock, address)
                return sock
            except OSError as error:
                sock.close()
                failures.append(error)
            except BaseException:
                sock.close()
                raise
        if len({str(failure) for failure in failures}) == 1:
            raise failures[0]
        raise OSError(f"Multiple exceptions: {', '.join(map(str, failures))}")

    async def _until_connected(self, sock: socket.socket, address: Any) -> None:
        """Waits until `sock` is connected. uvloop's `sock_connect` would resolve the address again, in a thread."""
        try:
            return sock.connect(address)
        except BlockingIOError:
            connected = self.create_future()
        self.add_writer(sock, _resolve, connected)
        try:
            await connected
        finally:
            self.remove_writer(sock)
        if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(number, os.strerror(number))


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _close_if_open(sock: socket.socket) -> None:
    """Closes the socket unless its descriptor is closed already: uvloop may have closed it without telling the socket, and a second close
    would hit whatever has the number now."""
    if forks.is_open(sock):
        sock.close()
    else:
        sock.detach()
