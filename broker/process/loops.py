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
    """For threads that run user code. A forked child shares no epoll with its parent: what it did to its own copy of a loop would be done
    to the parent's, down to taking its events."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = 0  # that runs it
        self._poll_once()
        forks.mend_in_children(self)

    def _poll_once(self) -> None:
        """libuv puts its wake-up descriptors into the epoll when it polls first. In a child of a loop that never did, they would be put
        into the child's epoll, and the child would take wake-ups of the parent's."""
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
            self.call_soon(forks.end_child)  # where its code comes back here, or awaits


def _renew_epoll(fd: int) -> None:
    if hasattr(select, "epoll"):  # elsewhere a child does not inherit it
        with select.epoll() as empty:
            os.dup2(empty.fileno(), fd, inheritable=False)


class IoLoop(WorkerLoop):
    """For threads that run nothing but ours. It makes the sockets of its connections itself, so that they are registered from their first
    moment: the ones that libuv makes are known only once they are connected."""

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
            _let_go(sock)
            raise

    async def _connect(self, addresses: Any, local_addr: Any) -> socket.socket:
        """To the first of them that takes us. Raises OSError, for several with all their words."""
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
        """uvloop's `sock_connect` would look the address up again, in a thread."""
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


def _let_go(sock: socket.socket) -> None:
    """uvloop may have closed the descriptor without telling the socket, which would close it again when the number is somebody else's."""
    if forks.is_open(sock):
        sock.close()
    else:
        sock.detach()
