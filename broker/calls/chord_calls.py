"""The job that gets the results of a whole group, as it stands in the group's record until all its jobs have ended."""

from __future__ import annotations

import msgspec

from ..envelope import RequestHead, Whole
from ..jobs import JobFacts
from ..values.sealed_structs import open_struct, seal_struct
from ..values.signing import SealScope, Signer

VERSION = 1


class ChordCall(msgspec.Struct, frozen=True, array_like=True):
    """A job without its argument and its backend. Times are store time in ms, 0 for none."""

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
        return seal_struct(self, signer, _scope(group_id))

    @classmethod
    def opened(cls, raw: bytes, signer: Signer, group_id: str) -> ChordCall:
        """Raises BadEnvelope and BadSignature, as `open_struct`."""
        return open_struct(cls, raw, signer, _scope(group_id), VERSION)


def _scope(group_id: str) -> SealScope:
    return SealScope("chord", id=group_id)
