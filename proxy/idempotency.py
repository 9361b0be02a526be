"""`Idempotency-Key` over HTTP: a client that has lost its connection sends the same request again and gets the answer of the first one."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, NamedTuple

from ..broker.calls.idempotency import VERSION, Claim, digest_of
from ..broker.errors import BadValue
from .calls import HttpCall
from .preferences import Headers

if TYPE_CHECKING:
    from .jobs import JobCall

KEY_HEADER = b"idempotency-key"
REPLAYED = (b"idempotent-replayed", b"true")
MAX_KEY_LENGTH = 255
_HASHED_AT_ONCE = 1024 * 1024  # bytes: a larger body is hashed in a thread


class KeyedCall(NamedTuple):
    """Where the key of a request counts, and what the request would claim it with."""

    scope: bytes
    claim: Claim


def read_key(headers: Headers) -> bytes:
    """Returns the key; empty without one. Raises BadValue."""
    found = [value for name, value in headers if name == KEY_HEADER]
    if not found:
        return b""
    if len(found) > 1 or not 1 <= len(found[0]) <= MAX_KEY_LENGTH:
        raise BadValue(f"there must be one Idempotency-Key, of 1 to {MAX_KEY_LENGTH} bytes")
    return found[0]


async def keyed(call: HttpCall, key: bytes, job: JobCall) -> KeyedCall:
    """A key counts for one endpoint and one `Authorization`, so that nobody gets the answers of others."""
    authorization = hashlib.sha256(call.header(b"authorization")).digest()
    scope = digest_of(call.target.endpoint.name.encode(), authorization, key)
    parts = (call.method.encode(), call.raw_path, call.query, job.content_type.encode(), job.body)
    fingerprint = digest_of(*parts) if len(job.body) <= _HASHED_AT_ONCE else await asyncio.to_thread(digest_of, *parts)
    return KeyedCall(scope, Claim(VERSION, job.id, job.backend, fingerprint))
