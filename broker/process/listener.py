"""The socket on which proxies listen. It is bound here, because a node holds it for the next proxy as well."""

from __future__ import annotations

import errno
import socket

from ..errors import BadValue
from . import forks


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
