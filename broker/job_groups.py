"""Groups: many jobs under one id. The ids of the members follow from the group's, so the group itself keeps only how many there are."""

from __future__ import annotations

import hmac

import msgspec

from .envelope import Whole
from .errors import UNPARSABLE, BadEnvelope


class GroupFacts(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the store keeps of a group at `group:{id}`."""

    total: Whole
    endpoint: str = ""
    created_ms: Whole = 0
    expires_ms: Whole = 0  # its jobs do not begin after that; 0: they wait for ever

    def to_bytes(self) -> bytes:
        return _encode(self)

    @classmethod
    def from_bytes(cls, raw: bytes) -> GroupFacts:
        """Raises BadEnvelope."""
        try:
            return _decode(raw)
        except UNPARSABLE as error:
            raise BadEnvelope(f"what is kept of a group does not parse ({error}): another program or version wrote it") from error


def member_id(group_id: str, number: int) -> str:
    """Returns the id of a member, from 0. It follows from the group's id alone, which cannot be told from it: each id is a right."""
    return hmac.digest(group_id.encode(), b"mqserve member %d" % number, "sha256")[:16].hex()


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(GroupFacts).decode
