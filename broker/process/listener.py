"""The socket on which proxies listen: bound here, because whoever starts a proxy may hold it for the proxy that comes after."""

from __future__ import annotations

import errno
import socket

from ..errors import BadValue
from . import forks


def bind(host: str, port: int) -> socket.socket:
    """A listening socket nobody else has. Raises BadValue with what to do when the address cannot be had."""
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
