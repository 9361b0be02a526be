"""The job that gets the results of a whole group, as it stands in the group's record until all its jobs have ended."""

from __future__ import annotations

import msgspec

from ..envelope import RequestHead, Whole
from ..errors import UNPARSABLE, BadEnvelope
from ..jobs import JobFacts
from ..values.signing import SealScope, Signer

VERSION = 1


class ChordCall(msgspec.Struct, frozen=True, array_like=True):
    """A job without its argument and its backend. It is sealed where there is a key: the controller vouches for what it sends with a seal
    of its own, and must not vouch for what anybody wrote into the store. Times are store time in ms, 0 for none."""

    v: int
    id: str
    head: RequestHead
    shard_key: str
    priority: int
    tag: str
    callback: str
    result_ttl_s: Whole  # 0: as the backend says
    created_ms: Whole
    not_before_ms: Whole
    expires_ms: Whole

    @property
    def facts(self) -> JobFacts:
        """What its record says until it is sent."""
        return JobFacts(
            "", self.head.endpoint, self.created_ms, self.expires_ms, self.not_before_ms, self.priority, self.tag, callback=self.callback
        )

    def sealed(self, signer: Signer, group_id: str) -> bytes:
        raw = _encode(self)
        return signer.seal(raw, _scope(group_id)) if signer else raw

    @classmethod
    def opened(cls, raw: bytes, signer: Signer, group_id: str) -> ChordCall:
        """Raises BadEnvelope, and BadSignature for one that was not made by a process of this instance."""
        if signer:
            raw = signer.open(raw, _scope(group_id))
        try:
            call = _decode(raw)
        except UNPARSABLE as error:
            raise BadEnvelope(f"it does not parse ({error}): another version wrote it, or one with a key, and here is none") from error
        if call.v != VERSION:
            raise BadEnvelope(f"it has version {call.v}, and this process reads {VERSION}: update it")
        return call


def _scope(group_id: str) -> SealScope:
    return SealScope("chord", id=group_id)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ChordCall).decode
