"""The answers to requests that no endpoint takes."""

from __future__ import annotations

from .calls import HttpCall
from .responses import Reply, problem
from .routes import NotAllowed


def not_served(refused: NotAllowed | None, call: HttpCall) -> Reply:
    if refused is None:
        detail = f"Path {call.path} not found. Please ping http://{_host(call)}/-/routes for routing table."
        return problem(404, detail, call.id)
    methods = list(refused.methods)
    detail = f"Methods {call.method} not allowed. Available HTTP methods are {methods}."
    return problem(405, detail, call.id, headers=((b"allow", ", ".join(methods).encode()),))


def _host(call: HttpCall) -> str:
    if host := call.header(b"host"):
        return host.decode("latin-1")[:255]
    return "{}:{}".format(*call.server) if call.server else "..."
