"""Keys by which callers say that two requests are one: which request has a key, as the store keeps it.

A request with a key is a job, so that it outlives the connection and the process that sent it. Whoever comes later with the same key gets
the answer of the first one. docs/protocol.md has the contract.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct

import msgspec

from ..errors import UNPARSABLE, KeyMisused, StoreUnavailable
from ..results import Outcome, Phase, Result
from ..store import Store
from ..store_keys import StoreKeys

VERSION = 1
KEY_TTL_S = 24 * 3600
_TRY_AGAIN = frozenset((429, 503))
_TRIES = 5
_FREED_MS = 1


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """Which request has the key, and the backend that was chosen for it. The fingerprint is that of all that makes it another request."""

    v: int
    id: str
    backend: str
    fingerprint: bytes


def frees_key(result: Result) -> bool:
    """Whether an answer says "try again", or the request never ran: another try must not get the same answer."""
    return result.status in _TRY_AGAIN or (
        result.outcome is Outcome.LATE and result.error is not None and result.error.phase is Phase.QUEUE
    )


_MISUSED_OVER_HTTP = (
    "this Idempotency-Key was sent with another request: method, path, query, content type and body must be the same; make a new key for "
    "each request"
)
MISUSED_BY_HANDLE = (
    "this idempotency_key was sent with another call of the endpoint: method_name, data and arguments must be the same; make a new key "
    "for each call"
)


def digest_of(*parts: bytes) -> bytes:
    """Returns the SHA-256 of the parts, each with its length: none can pass for the end of another."""
    found = hashlib.sha256()
    for part in parts:
        found.update(struct.pack(">Q", len(part)))
        found.update(part)
    return found.digest()


class IdempotencyKeys:
    """The keys of one namespace. `scope` is a digest of the key and of all within which it counts. `misuse` says, in the words of the
    senders, that a key was sent with another request."""

    def __init__(self, store: Store, keys: StoreKeys, *, misuse: str = _MISUSED_OVER_HTTP) -> None:
        self._store = store
        self._keys = keys
        self._misuse = misuse

    def __repr__(self) -> str:
        return f"<IdempotencyKeys of {self._keys!r}>"

    async def claim(self, scope: bytes, claim: Claim, ttl_s: int = KEY_TTL_S) -> Claim:
        """Returns the claim that stands: this one, or that of an earlier request. Raises KeyMisused if that is another request, and
        StoreUnavailable."""
        key, raw = self._keys.idempotent(scope.hex()), _encode(claim)
        for _ in range(_TRIES):
            if await self._store.set(key, raw, ttl_ms=ttl_s * 1000, only_new=True):
                return claim
            if found := await self._store.get(key):
                return _checked(found, claim, self._misuse)
            await asyncio.sleep(_FREED_MS / 500)
        raise StoreUnavailable("an idempotency key is freed as often as it is claimed", public="try again")

    async def free(self, scope: bytes, claim: Claim) -> None:
        """Gives the key back, if the claim still stands, so that the next request runs: nothing stands there, and expires at once, since
        proxies have no right to delete. Raises StoreUnavailable."""
        await self._store.replace(self._keys.idempotent(scope.hex()), _encode(claim), b"", ttl_ms=_FREED_MS, quiet=True)


def _checked(raw: bytes, claim: Claim, misuse: str) -> Claim:
    try:
        found = _decode(raw)
    except UNPARSABLE as error:
        raise StoreUnavailable(f"what an idempotency key holds does not parse ({error}): another program or version wrote it") from error
    if found.fingerprint != claim.fingerprint:
        raise KeyMisused(misuse)
    return found


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Claim).decode
