"""The socket on which proxies listen, and the file of those that share one. They are made here, because a node holds them for the next
proxy as well."""

from __future__ import annotations

import errno
import io
import os
import socket
import tempfile
from typing import IO

from ..errors import BadValue
from . import forks

KEY_BYTES = 32


def new_common_file() -> io.FileIO:
    """Returns a file without a name for the proxies that share a socket. It begins with a key that only they know. It is in memory where
    there are such files, since a disk may be full. Raises OSError."""
    with _unnamed_file() as file:
        file.write(os.urandom(KEY_BYTES))
        return io.FileIO(os.dup(file.fileno()), "r+b")


def _unnamed_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return io.FileIO(os.memfd_create("mqserve proxies"), "r+b")
    return tempfile.TemporaryFile(buffering=0)


def bind(host: str, port: int) -> socket.socket:
    """Returns a listening socket that no other process has. Raises BadValue, with the mend, if the address cannot be bound."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = forks.guarded_socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(2048)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        is_host = isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL
        mend = "give a --host that this machine has" if is_host else "choose another --port, or end the program that has it"
        raise BadValue(f"cannot listen on {host}:{port} ({reason}): {mend}") from error
    return listener
