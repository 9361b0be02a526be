"""Turns results and errors into HTTP responses."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from http.client import responses
from typing import Any

import msgspec

from ..broker import backoff
from ..broker.envelope import Pairs
from ..broker.errors import UNPARSABLE, BadValue, MQServeError, Overloaded, public_words
from ..broker.results import Result

logger = logging.getLogger(__name__)

Reply = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers without content-length, body."""

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding "
    b"upgrade http2-settings".split()
)
NO_BODY = frozenset((204, 205, 304))
NO_MEMBERS: Mapping[str, Any] = {}

_OF_PROBLEMS = frozenset((b"content-type", b"x-request-id"))  # the headers that describe our own body
_NOT_THEIRS = HOP_BY_HOP | {b"content-length"}
_LENGTH = re.compile(rb"[0-9]{1,18}")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTENT_TYPE = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")


def from_result(result: Result, request_id: str, *, debug: bool, to_head: bool = False) -> Reply:
    """Turns a result into a response. With `to_head` it answers a HEAD request, which may give the length that the body of a GET would
    have."""
    if result.error is not None:
        members = _members(result.error.members) if result.error.members else NO_MEMBERS
        return problem(
            result.status, explain(result, debug=debug), request_id, headers=safe_headers(result.headers, result.backend), members=members
        )
    headers = [(b"content-type", _content_type(result.content_type, result.backend))] if result.content_type else []
    if result.headers:
        headers += safe_headers(result.headers, result.backend)
        if to_head:
            headers += [(name, value) for name, value in result.headers if name == b"content-length" and _LENGTH.fullmatch(value)][:1]
    headers.append((b"x-request-id", request_id.encode()))
    return result.status, headers, b"" if result.status in NO_BODY else result.body


def from_error(error: MQServeError, request_id: str, *, debug: bool = False) -> Reply:
    """Turns an error that kept the request from being sent, or its result from being read, into a response. Addresses and users of our
    servers appear in the log only."""
    status = 400 if isinstance(error, BadValue) else error.status
    detail = str(error) if debug else public_words(error)
    retry_after_s: float | None = None
    if isinstance(error, Overloaded):
        retry_after_s = error.retry_after_s
    elif status == 503:
        logger.info("request %s is answered 503: %s", request_id, error)
        retry_after_s = backoff.retry_after_s()
    return problem(status, detail, request_id, retry_after_s=retry_after_s)


def problem(
    status: int,
    detail: str,
    request_id: str,
    *,
    retry_after_s: float | None = None,
    headers: Iterable[tuple[bytes, bytes]] = (),
    members: Mapping[str, Any] = NO_MEMBERS,
) -> Reply:
    """Returns an RFC 9457 problem with the request's id. `members` are added to ours, or replace them."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": "Client Closed Request" if status == 499 else responses.get(status, "Error"),  # 499 is nginx's
        "status": status,
        "detail": detail,
        "request_id": request_id,
        **members,
    }
    found = [(b"content-type", b"application/problem+json"), (b"x-request-id", request_id.encode())]
    found += [(name, value) for name, value in headers if name.lower() not in _OF_PROBLEMS]
    if retry_after_s is not None:
        found.append((b"retry-after", str(math.ceil(retry_after_s)).encode()))
    return status, found, msgspec.json.encode(body)


def with_length(reply: Reply, *, to_head: bool) -> Reply:
    """Returns the reply as it is sent: with a content-length where there may be one, and without the body for a HEAD request. What
    has no body for HEAD may have one for GET, such as an answer that flows."""
    status, headers, body = reply
    if status in (204, 304):
        return status, headers, b""
    if not (to_head and (not body or any(name == b"content-length" for name, _ in headers))):
        headers.append((b"content-length", b"%d" % len(body)))
    return status, headers, b"" if to_head else body


def _members(raw: bytes) -> Mapping[str, Any]:
    try:
        return msgspec.json.decode(raw, type=dict[str, Any])
    except UNPARSABLE:
        return NO_MEMBERS


def json_reply(value: object, status: int = 200) -> Reply:
    return status, [(b"content-type", b"application/json")], msgspec.json.encode(value)


def explain(result: Result, *, debug: bool) -> str:
    """Returns what a web client gets to know of an error."""
    assert result.error is not None
    # without a traceback the message is meant for the client, whether the handler wrote it or we did
    if result.status == 500 and result.error.traceback:
        if debug:
            return result.error.traceback
        return f"the handler raised {result.error.type}; the traceback is in the replica's log (or here, with --debug)"
    return result.error.message


@lru_cache(maxsize=256)
def _content_type(text: str, backend: str) -> bytes:
    if _CONTENT_TYPE.fullmatch(text):
        return text.encode("latin-1")
    logger.warning("%s answered with a content type that HTTP cannot carry, %.100r: sent as bytes", backend, text)
    return b"application/octet-stream"


def safe_headers(given: Pairs, backend: str) -> list[tuple[bytes, bytes]]:
    """Returns the headers that user code may set: none that splits the response, and none about its length or the connection.

    A header that HTTP cannot carry is left out and logged; the answer goes on without it.
    """
    headers: list[tuple[bytes, bytes]] = []
    for name, value in given:
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            logger.warning("%s answered with a header that HTTP cannot carry, %.100r: left out", backend, name)
        elif name.lower() not in _NOT_THEIRS:
            headers.append((name, value))
    return headers
