"""The paths under `/-/`: which exist, and who may read them."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..broker.envelope import mint_id
from ..broker.process.loopback import is_loopback, names_loopback
from .responses import Reply, problem

Scope = dict[str, Any]

_FORWARDED = frozenset((b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-prefix", b"x-real-ip"))


@dataclass(frozen=True, slots=True)
class SystemPath:
    """A path under `/-/`. An open one answers anybody: it reveals nothing, or knowing its path is the right to read it."""

    answer: Callable[[Scope], Awaitable[Reply]]
    methods: tuple[str, ...] = ("GET", "HEAD")
    open: bool = False


class SystemPaths:
    """All system paths but those of `futures.py`."""

    def __init__(self, paths: Mapping[str, SystemPath], admin_token: str) -> None:
        self._paths = paths
        self._token = admin_token.encode()

    def __repr__(self) -> str:
        return f"<SystemPaths {', '.join(self._paths)}>"

    async def answer(self, scope: Scope) -> Reply:
        if (refusal := self.refusal(scope)) is not None:
            return refusal
        path = scope["path"]
        if (system_path := self._paths.get(path)) is None:
            return problem(
                404, f"System path {path} not found. There are {', '.join(self._paths)}, and those under /-/futures/.", mint_id()
            )
        if scope["method"] not in system_path.methods:
            allowed = ", ".join(system_path.methods)
            return problem(405, f"{path} takes {allowed}.", mint_id(), headers=((b"allow", allowed.encode()),))
        if not (system_path.open or self.trusts(scope)):
            return forbidden(path)
        return await system_path.answer(scope)

    def refusal(self, scope: Scope) -> Reply | None:
        """Returns the answer to a page of another site; None for all others."""
        if _is_same_origin(scope):
            return None
        return problem(403, "System paths are not answered to pages of other sites: the Origin header names another host.", mint_id())

    def trusts(self, scope: Scope) -> bool:
        """Whether the request comes from this machine, or carries the token."""
        return _is_local(scope) or self._has_token(scope)

    def _has_token(self, scope: Scope) -> bool:
        scheme, _, token = _header(scope, b"authorization").partition(b" ")
        return bool(self._token) and scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)


def forbidden(path: str) -> Reply:
    return problem(
        403,
        f"{path} is answered to this machine only (by a loopback address, in the Host header too), or with the header "
        "'Authorization: Bearer …' and the proxy's MQSERVE_ADMIN_TOKEN in it.",
        mint_id(),
    )


def _is_local(scope: Scope) -> bool:
    """Whether the request comes from this machine, is addressed to it, and was not forwarded: the address of a reverse proxy says nothing
    about the client."""
    if any(name in _FORWARDED for name, _ in scope["headers"]):
        return False
    return scope["client"] is not None and is_loopback(scope["client"][0]) and names_loopback(_header(scope, b"host").decode("latin-1"))


def _is_same_origin(scope: Scope) -> bool:
    own = b"//" + _header(scope, b"host").lower()
    return all(value.lower().partition(b":")[2] == own for name, value in scope["headers"] if name == b"origin")


def _header(scope: Scope, wanted: bytes) -> bytes:
    return next((value for name, value in scope["headers"] if name == wanted), b"")
