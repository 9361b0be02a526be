"""What one process leaves for a controller to send later: the call of a schedule, what follows a group, the plan of a pipeline.

It is sealed where there is a key: the controller vouches for what it sends with a seal of its own, and must not vouch for what anybody
wrote into the store.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec

from ..errors import UNPARSABLE, BadEnvelope
from .signing import SealScope, Signer


class Versioned(Protocol):
    """A struct that says by which version of itself it was written."""

    @property
    def v(self) -> int: ...


T = TypeVar("T", bound=Versioned)


def seal_struct(struct: Versioned, signer: Signer, scope: SealScope) -> bytes:
    raw = _encode(struct)
    return signer.seal(raw, scope) if signer else raw


def open_struct(kind: type[T], raw: bytes, signer: Signer, scope: SealScope, version: int, what: str = "it") -> T:
    """Raises BadEnvelope for one that does not parse or has another version, and BadSignature for one that no process with our key made.
    `what` is its name in these errors."""
    if signer:
        raw = signer.open(raw, scope)
    try:
        struct = msgspec.msgpack.decode(raw, type=kind)
    except UNPARSABLE as error:
        raise BadEnvelope(f"{what} does not parse ({error}): another version wrote it, or one with a key, and here is none") from error
    if struct.v != version:
        raise BadEnvelope(f"{what} has version {struct.v}, and this process reads {version}: update it")
    return struct


_encode = msgspec.msgpack.Encoder().encode
