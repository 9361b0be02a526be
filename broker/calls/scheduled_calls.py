"""The call that a schedule makes each time, as it stands in the desired document."""

from __future__ import annotations

import msgspec

from ..envelope import RequestHead, Whole
from ..values.codecs import encode_value, sealed_anew
from ..values.sealed_structs import open_struct, seal_struct
from ..values.signing import SealScope, Signer

VERSION = 1
MAX_BYTES = 16 * 1024  # every process reads the document
_CONTENT_TYPE = "application/x-mqserve-schedule"


class ScheduledCall(msgspec.Struct, frozen=True, array_like=True):
    """A request without its id, and how it is to be treated as a job."""

    v: int
    content_type: str
    body: bytes
    head: RequestHead
    shard_key: str
    priority: int
    tag: str
    result_ttl_s: Whole  # 0: as the backend says
    expires_ms: Whole  # from its sending on; 0 for never
    callback: str = ""  # the URL that is told of the end of each job

    def sealed(self, signer: Signer, endpoint: str, schedule: str) -> bytes:
        return seal_struct(self, signer, _scope(endpoint, schedule, _CONTENT_TYPE))

    @classmethod
    def opened(cls, raw: bytes, signer: Signer, endpoint: str, schedule: str) -> ScheduledCall:
        """Raises BadEnvelope and BadSignature, as `open_struct`."""
        return open_struct(cls, raw, signer, _scope(endpoint, schedule, _CONTENT_TYPE), VERSION)

    def body_for(self, signer: Signer, endpoint: str, schedule: str, backend: str, job_id: str, lifetime_ms: int) -> bytes:
        """Returns the body of one job. Raises BadSignature for a pickle that we did not seal."""
        claim, new = _scope(endpoint, schedule), SealScope("request", backend, job_id)
        return sealed_anew(self.body, self.content_type, signer, claim, new, lifetime_ms)


def encode_data(data: object, signer: Signer, endpoint: str, schedule: str) -> tuple[str, bytes]:
    """Returns content type and body of a call with that argument. Raises NotEncodable."""
    return encode_value([data, {}], signer, _scope(endpoint, schedule))


def _scope(endpoint: str, schedule: str, content_type: str = "") -> SealScope:
    return SealScope("schedule", endpoint, schedule, content_type)
