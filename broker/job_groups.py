"""Groups: many jobs under one id, counted by the store as they end, and perhaps one that follows them all (a chord).

The ids of the members follow from the group's. The hash at `group:{id}` says how many there are and how many have ended in which way; the
string at `group:{id.ends}` has a byte for each member, so that none is counted twice, and 0 for one that has not ended.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping

import msgspec

from .envelope import Whole
from .errors import UNPARSABLE, BadEnvelope
from .jobs import JobState

ENDS = tuple(state for state in JobState if state.is_final)
STATE_OF_BYTE: Mapping[int, JobState] = {ord(state[0]): state for state in ENDS}
"""The first letter of its name stands for each way to end."""


class GroupFacts(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of a group when it is sent, and does not change: the field `facts` of its record."""

    total: Whole
    endpoint: str = ""
    created_ms: Whole = 0
    expires_ms: Whole = 0  # its jobs do not begin after that; 0: they wait for ever
    then: str = ""  # the id of the job that gets all results

    def to_bytes(self) -> bytes:
        return _encode(self)

    @classmethod
    def from_bytes(cls, raw: bytes) -> GroupFacts:
        """Raises BadEnvelope."""
        try:
            return _decode(raw)
        except UNPARSABLE as error:
            raise BadEnvelope(f"what is kept of a group does not parse ({error}): another program or version wrote it") from error


class GroupRecord(msgspec.Struct, frozen=True):
    """What the store knows of a group, as it was read. `call` is that of the job that gets all results (`calls/chord_calls.py`), empty if
    there is none."""

    facts: GroupFacts
    ended: Mapping[JobState, int]  # how many have ended in which way
    call: bytes = b""


def member_id(group_id: str, number: int) -> str:
    """Returns the id of a member, from 0. It follows from the group's id alone, which cannot be told from it: each id is a right."""
    return hmac.digest(group_id.encode(), b"mqserve member %d" % number, "sha256")[:16].hex()


def chord_id(group_id: str) -> str:
    """Returns the id of the job that gets all results of a group."""
    return hmac.digest(group_id.encode(), b"mqserve chord", "sha256")[:16].hex()


def ends_in(raw: bytes) -> dict[int, JobState]:
    """Returns the members that have ended, from what stands at `group:{id.ends}`."""
    return {number: STATE_OF_BYTE[byte] for number, byte in enumerate(raw) if byte in STATE_OF_BYTE}


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(GroupFacts).decode
