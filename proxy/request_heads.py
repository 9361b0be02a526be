"""What of an HTTP request counts for the proxy, and what of it travels to a replica."""

from __future__ import annotations

import math
from typing import Any

from ..broker.envelope import RequestHead
from ..broker.errors import BadValue
from ..broker.failures import name_of
from ..broker.values.codecs import is_plain
from .calls import HttpCall
from .preferences import PRIORITY_HEADER, read_priority

CALL_METHOD_HEADER = b"x-serve-call-method"
SHARD_KEY_HEADER = b"x-serve-shard-key"
TIMEOUT_HEADER = b"x-request-timeout-seconds"

_READ = frozenset((b"content-type", CALL_METHOD_HEADER, SHARD_KEY_HEADER, TIMEOUT_HEADER, PRIORITY_HEADER))


def read_headers(headers: list[tuple[bytes, bytes]]) -> tuple[str, str, str, float, str]:
    """(content type, method to call, shard key, seconds that the client allows, priority). Raises BadValue for a bad one."""
    content_type, call, shard_key, timeout_s, priority = b"application/octet-stream", b"", b"", math.inf, "normal"
    for name, value in headers:
        if name not in _READ:
            pass
        elif name == b"content-type":
            content_type = value
        elif name == CALL_METHOD_HEADER:
            call = value
        elif name == SHARD_KEY_HEADER:
            shard_key = value
        elif name == TIMEOUT_HEADER:
            timeout_s = min(timeout_s, _read_timeout(value))
        else:
            priority = read_priority(value)
    return content_type.decode("ascii", "ignore")[:255], call.decode("latin-1"), shard_key.decode("latin-1"), timeout_s, priority


def shard_key_of(headers: list[tuple[bytes, bytes]]) -> str:
    return next((value.decode("latin-1") for name, value in reversed(headers) if name == SHARD_KEY_HEADER), "")


def _read_timeout(value: bytes) -> float:
    try:
        timeout_s = float(value)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise BadValue("X-Request-Timeout-Seconds must be a number of seconds above 0, such as 2.5: the backend's own limit is the highest")
    return timeout_s


def head_of(call: HttpCall, method: str) -> RequestHead:
    """Returns what a replica gets of the request beside its body."""
    travelling, lost = _travelling(call.state) if call.state else (None, None)
    return RequestHead(
        call.method,
        call.path,  # two by position: with more than 15 keywords CPython makes a dict for the call, and that costs four times as much
        raw_path=call.raw_path if b"%" in call.raw_path else b"",
        query=call.query,
        headers=tuple(call.headers),
        params=call.target.params,
        route=call.target.pattern,
        root_path=call.target.root_path,
        endpoint=call.target.endpoint.name,
        call=method,
        http_version=call.http_version,
        scheme=call.scheme,
        client=call.client,
        server=call.server,
        state=travelling,
        lost_state=lost,
    )


def _travelling(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What middlewares set on `request.state`: what is plain data, and of the rest the types, for whoever asks for it in a replica."""
    named = {name: value for name, value in state.items() if isinstance(name, str)}
    plain = {name: value for name, value in named.items() if _is_plain(value)}
    return plain, {name: name_of(type(value)) for name, value in named.items() if name not in plain}


def _is_plain(value: object) -> bool:
    try:
        return is_plain(value)
    except RecursionError:
        return False
