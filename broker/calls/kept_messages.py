"""The message of a job as the store keeps it beside the record, so that anybody may send it once more."""

from __future__ import annotations

import msgspec

from ..envelope import Envelope, Header
from ..errors import UNPARSABLE, BadEnvelope
from ..jobs import UNENDED_TTL_S
from ..values.signing import SealScope, Signer

VERSION = 1
_CONTENT_TYPE = "application/x-mqserve-job"  # in the seal: so that no other bytes of a request pass for a message


class KeptMessage(msgspec.Struct, frozen=True, array_like=True):
    """A message without its id. It is sealed where there is a key: a retry vouches for it with a seal of its own, and must not vouch for
    what anybody wrote into the store."""

    v: int
    content_type: str
    priority: int
    header: Header
    body: bytes

    @classmethod
    def of(cls, envelope: Envelope) -> KeptMessage:
        return cls(VERSION, envelope.content_type, envelope.priority, envelope.header, envelope.body)

    def sealed(self, signer: Signer, backend: str, future_id: str) -> bytes:
        raw = _encode(self)
        return signer.seal(raw, _scope(backend, future_id), UNENDED_TTL_S * 1000) if signer else raw

    @classmethod
    def opened(cls, raw: bytes, signer: Signer, backend: str, future_id: str) -> KeptMessage:
        """Raises BadEnvelope, and BadSignature for one that was not kept by a process of this instance."""
        if signer:
            raw = signer.open(raw, _scope(backend, future_id))
        try:
            message = _decode(raw)
        except UNPARSABLE as error:
            raise BadEnvelope(
                f"the kept message of job {future_id} does not parse ({error}): another program or version wrote it"
            ) from error
        if message.v != VERSION:
            raise BadEnvelope(f"the kept message of job {future_id} has version {message.v}, and this process reads {VERSION}: update it")
        return message


def _scope(backend: str, future_id: str) -> SealScope:
    return SealScope("request", backend, future_id, _CONTENT_TYPE)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(KeptMessage).decode
