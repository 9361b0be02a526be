"""Results and refusals as HTTP responses."""

from __future__ import annotations

import math
from http.client import responses
from typing import Any

import msgspec

from ..broker.envelope import Pairs
from ..broker.errors import (
    BadValue,
    BrokerUnavailable,
    Cancelled,
    MQServeError,
    NoReplica,
    NotRouted,
    Overloaded,
    StoreUnavailable,
    TooLarge,
)
from ..broker.results import Result

Reply = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers without content-length, body."""

_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)


def from_result(result: Result, request_id: str, *, debug: bool) -> Reply:
    if result.error is not None:
        return problem(result.status, _explain(result, debug=debug), request_id)
    headers = _safe(((b"content-type", result.content_type.encode("latin-1", "replace")), *result.headers))
    headers.append((b"x-request-id", request_id.encode()))
    return result.status, headers, result.body


def from_error(error: MQServeError, request_id: str) -> Reply:
    """What kept a request from being sent, or its result from being read."""
    match error:
        case Overloaded():
            return problem(429, str(error), request_id, retry_after_s=error.retry_after_s)
        case TooLarge():
            return problem(error.status, str(error), request_id)
        case BadValue():
            return problem(400, str(error), request_id)
        case Cancelled():
            return problem(499, str(error), request_id)
        case BrokerUnavailable() | StoreUnavailable() | NotRouted() | NoReplica():
            return problem(503, str(error), request_id, retry_after_s=1)
        case _:
            return problem(500, str(error), request_id)


def problem(status: int, detail: str, request_id: str, *, retry_after_s: float | None = None, headers: Pairs = ()) -> Reply:
    """RFC 9457, with the request's id."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": "Client Closed Request" if status == 499 else responses.get(status, "Error"),  # 499 is nginx's
        "status": status,
        "detail": detail,
        "request_id": request_id,
    }
    found = [(b"content-type", b"application/problem+json"), (b"x-request-id", request_id.encode()), *headers]
    if retry_after_s is not None:
        found.append((b"retry-after", str(math.ceil(retry_after_s)).encode()))
    return status, found, msgspec.json.encode(body)


def json_reply(value: object, status: int = 200) -> Reply:
    return status, [(b"content-type", b"application/json")], msgspec.json.encode(value)


def _explain(result: Result, *, debug: bool) -> str:
    assert result.error is not None
    if debug and result.error.traceback:
        return result.error.traceback
    if result.status == 500 and result.error.traceback:  # without one it is our own sentence, of a request that was set aside
        return f"the handler raised {result.error.type}; the traceback is in the replica's log (or here, with --debug)"
    return result.error.message


def _safe(headers: Pairs) -> list[tuple[bytes, bytes]]:
    """What user code may set: nothing that splits the response or speaks of the connection."""
    return [
        (name, value)
        for name, value in headers
        if name.lower() not in _HOP_BY_HOP and not any(bad in name + value for bad in (b"\r", b"\n", b"\0"))
    ]
