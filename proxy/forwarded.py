"""The servers in front of a proxy whose word about a request counts: about its client (`X-Forwarded-For`, `X-Forwarded-Proto`), and about
the part of the path that they take away (`X-Forwarded-Prefix`).

uvicorn's middleware does the same for ASGI apps, but a plain request is served without ASGI. So the edge does it for all requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

NAMES = frozenset((b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-prefix"))
PREFIX = "mqserve.prefix"
"""Where the scope of a request has the prefix that a trusted server says."""

Client = tuple[str, int] | None

_PREFIX = re.compile(r"(?:/[\w.~!$&'()*+,;=:@%-]+)+/?", re.ASCII)
_SCHEMES = frozenset(("http", "https", "ws", "wss"))


class Forwarders:
    """The trusted addresses. uvicorn's own class decides which address is one."""

    def __init__(self, allowed: str) -> None:
        no_app: Any = None
        self._trusted = ProxyHeadersMiddleware(no_app, allowed).trusted_hosts
        self._allowed = allowed

    def __repr__(self) -> str:
        return f"<Forwarders {self._allowed}>"

    def read(self, headers: Iterable[tuple[bytes, bytes]], scheme: str, peer: Client) -> tuple[str, Client]:
        """Returns scheme and client as the headers say, if the peer is trusted; else the scheme and the peer as they are."""
        if (peer[0] if peer else None) not in self._trusted:
            return scheme, peer
        protocol = b""
        addresses: list[bytes] = []
        for name, value in headers:
            if name == b"x-forwarded-for":
                addresses.append(value)
            elif name == b"x-forwarded-proto":
                protocol = value
        if (told := protocol.decode("latin-1").strip()) in _SCHEMES:
            scheme = told
        if addresses:
            host, port = self._trusted.get_trusted_client_address(b", ".join(addresses).decode("latin-1"))
            if host:
                return scheme, (host, port)
        return scheme, peer

    def prefix(self, headers: Iterable[tuple[bytes, bytes]], peer: Client) -> str:
        """Returns what stands before the path for the client, without a slash at its end; empty if no trusted peer says it."""
        if (peer[0] if peer else None) not in self._trusted:
            return ""
        told = next((value.decode("latin-1") for name, value in headers if name == b"x-forwarded-prefix"), "")
        return told.rstrip("/") if _PREFIX.fullmatch(told) else ""


def forwarders(allowed: str | list[str]) -> Forwarders:
    """`allowed` is what uvicorn's `forwarded_allow_ips` may be: addresses and networks, or `*`."""
    return _forwarders(allowed if isinstance(allowed, str) else ",".join(allowed))


_forwarders = lru_cache(maxsize=8)(Forwarders)
