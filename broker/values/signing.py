"""Seals: proof that the bytes were made by a holder of the instance's secret key.

A sealed value is MessagePack `[1, key id, expiry, mac, payload]`. The mac covers the version, the key id, the namespace, the purpose and
the recipient of the bytes, the content type, the expiry and the SHA-256 of the payload; it is compared in constant time and before
anything is decoded. Celery's `auth` serializer signs only the body, and leaves out the rest.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import msgspec

from ..errors import UNPARSABLE, BadSignature, BadValue

MIN_KEY_BYTES = 32

Purpose = Literal["chord", "code", "pipeline", "request", "result", "schedule"]

_DAY_MS = 24 * 3600 * 1000
# Seals expire by the wall clock, so lifetimes are days: a request may stay among the dead letters for seven (a job says how long it may
# wait), a result is kept for at most thirty.
LIFETIMES_MS = {  # 0: for ever
    "chord": 0, "code": 0, "pipeline": 0, "schedule": 0, "request": 8 * _DAY_MS, "result": 31 * _DAY_MS,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SealScope:
    """What sealed bytes are valid for. A seal opens only under the scope that it was made for."""

    purpose: Purpose
    backend: str = ""
    id: str = ""
    content_type: str = ""


def key_id_of(key: bytes) -> str:
    """The key's name in a seal: eight hex digits that reveal nothing about it."""
    return hashlib.sha256(b"mqserve key id" + key).hexdigest()[:8]


class Signer:
    """Seals with the first key, opens with any key; so a key can be rotated."""

    def __init__(self, keys: Sequence[bytes], namespace: str, clock: Callable[[], float] = time.time) -> None:
        for key in keys:
            if len(key) < MIN_KEY_BYTES:
                raise BadValue(
                    f"MQSERVE_SECRET_KEY has {len(key)} bytes, and {MIN_KEY_BYTES} is the least that protects anything: "
                    "make one with `openssl rand -hex 32`"
                )
        self._keys = {key_id_of(key): key for key in keys}
        self._current = next(iter(self._keys), "")
        self._namespace = namespace
        self._clock = clock

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __repr__(self) -> str:
        return f"<Signer of {self._namespace} with {len(self._keys)} keys>"

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The names of all its keys."""
        return tuple(self._keys)

    @property
    def current_key_id(self) -> str:
        """The name of the key with which it seals; empty without one."""
        return self._current

    def seal(self, payload: bytes, claim: SealScope, lifetime_ms: int = 0) -> bytes:
        """Returns the payload, sealed for `lifetime_ms`, or for the lifetime of its purpose. Raises BadSignature without a key."""
        if not self._keys:
            raise BadSignature("nothing can be signed: MQSERVE_SECRET_KEY is not set")
        lifetime_ms = lifetime_ms or LIFETIMES_MS[claim.purpose]
        expires_ms = int(self._clock() * 1000) + lifetime_ms if lifetime_ms else 0
        mac = self._mac(self._current, payload, claim, expires_ms)
        return msgspec.msgpack.encode([1, self._current, expires_ms, mac, payload])

    def open(self, sealed: bytes, claim: SealScope) -> bytes:
        """Returns the payload. Raises BadSignature unless one of our keys sealed it for exactly this scope and it has not expired."""
        try:
            version, key_id, expires_ms, mac, payload = msgspec.msgpack.decode(sealed, type=tuple[int, str, int, bytes, bytes])
        except UNPARSABLE as error:
            raise BadSignature(f"not a sealed value ({error})") from error
        if version != 1 or key_id not in self._keys:
            raise BadSignature("sealed by a key that this instance does not hold: do all processes share MQSERVE_SECRET_KEY?")
        if not hmac.compare_digest(mac, self._mac(key_id, payload, claim, expires_ms)):
            raise BadSignature(
                f"the seal does not fit: the bytes were not signed as {claim.purpose} for {claim.backend or 'this instance'}"
            )
        if expires_ms and self._clock() * 1000 > expires_ms:
            raise BadSignature(f"the seal of this {claim.purpose} has expired: it was good until {_date(expires_ms)}")
        return payload

    def derived_id(self, *parts: str | int) -> str:
        """Returns the id of something that follows from these parts, in the form of a minted one: whoever makes it again makes the same.
        Nobody can tell it without the key; where there is none, one of the parts has to be secret."""
        key = hmac.digest(self._keys.get(self._current, b""), b"mqserve derived id 1", "sha256")  # a separate key for each use
        return hmac.digest(key, msgspec.msgpack.encode([self._namespace, *parts]), "sha256")[:16].hex()

    def _mac(self, key_id: str, payload: bytes, claim: SealScope, expires_ms: int) -> bytes:
        digest = hashlib.sha256(payload).digest()
        signed = [1, key_id, self._namespace, claim.purpose, claim.backend, claim.id, claim.content_type, expires_ms, digest]
        return hmac.digest(self._keys[key_id], msgspec.msgpack.encode(signed), "sha256")


def _date(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M} UTC"
