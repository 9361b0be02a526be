"""The seal of an `mq` header: proof that a holder of the instance's secret key sent the message.

It stands beside the header, in an AMQP header of its own, so that a reader of an earlier version finds the header unchanged.
`envelope.py`, which writes and reads the message, says what the seal covers.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from enum import Enum

from .signing import key_id_of

SEAL_BYTES = 20
_KEY_ID_BYTES, _MAC_BYTES = 4, 16
_BACKENDS_KEPT = 10_000  # a limit, so that made-up backend names do not fill the memory


class Seal(Enum):
    """The result of checking the seal of a delivery's `mq` header."""

    NONE = "it has none"
    VALID = "it fits"
    FOREIGN = "its key is not known here"
    BROKEN = "it does not fit"


class HeaderSeals:
    """Makes seals with the first key, and checks seals of any key."""

    def __init__(self, keys: Sequence[bytes], namespace: str) -> None:
        self._namespace = namespace
        self._hashes: dict[bytes, hashlib.blake2b] = {}
        for key in keys:
            subkey = hmac.digest(key, b"mqserve mq-seal 1", "sha256")  # a separate key for each use: this one never opens a pickle
            key_id = bytes.fromhex(key_id_of(key))
            self._hashes[key_id] = hashlib.blake2b(namespace.encode() + b"\0", digest_size=_MAC_BYTES, key=subkey)
        self._backends: dict[str, BackendSeals] = {}

    def __repr__(self) -> str:
        return f"<HeaderSeals of {self._namespace} with {len(self._hashes)} keys>"

    def of(self, backend: str) -> BackendSeals | None:
        """The seals for messages to one backend; None without a key."""
        if not self._hashes:
            return None
        found = self._backends.get(backend)
        if found is None:
            if len(self._backends) >= _BACKENDS_KEPT:
                self._backends.clear()
            found = self._backends[backend] = BackendSeals(backend, self._hashes)
        return found


class BackendSeals:
    """Seals that are valid for one backend. Namespace and backend are hashed once, and the hash state is copied for each message."""

    def __init__(self, backend: str, hashes: dict[bytes, hashlib.blake2b]) -> None:
        self._backend = backend
        self._hashes: dict[bytes, hashlib.blake2b] = {}
        for key_id, of_namespace in hashes.items():
            self._hashes[key_id] = of_backend = of_namespace.copy()
            of_backend.update(backend.encode() + b"\0")
        self._key_id, self._hash = next(iter(self._hashes.items()))

    def __repr__(self) -> str:
        return f"<BackendSeals of {self._backend} with {len(self._hashes)} keys>"

    def make(self, covered: bytes) -> bytes:
        """Returns the key id and the MAC: SEAL_BYTES bytes."""
        mac = self._hash.copy()
        mac.update(covered)
        return self._key_id + mac.digest()

    def check(self, seal: object, covered: bytes) -> Seal:
        """Checks a seal. `seal` is the value as it stood in the message, of any type."""
        if not isinstance(seal, bytes | bytearray) or len(seal) != SEAL_BYTES:
            return Seal.BROKEN
        of_backend = self._hashes.get(bytes(seal[:_KEY_ID_BYTES]))
        if of_backend is None:
            return Seal.FOREIGN
        mac = of_backend.copy()
        mac.update(covered)
        return Seal.VALID if hmac.compare_digest(mac.digest(), seal[_KEY_ID_BYTES:]) else Seal.BROKEN
