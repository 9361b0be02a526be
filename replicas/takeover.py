"""Requests of which an earlier run has shown a part of its answer: they are ended with an error, or replayed behind that part."""

from __future__ import annotations

import msgspec

from ..broker.envelope import Envelope
from ..broker.errors import BadEnvelope, StoreUnavailable
from ..broker.results import ErrorInfo, Result
from ..broker.store import Store
from ..broker.store_keys import STREAM_TTL_S, StoreKeys
from ..broker.streams import Owner, lost_result
from ..controller.state.config import MAX_REQUEST_TIMEOUT_S, BackendConfig
from .outgoing import Outgoing


def is_kept_for_replay(envelope: Envelope) -> bool:
    """Whether the broker keeps the message beyond its deadline, for MAX_REQUEST_TIMEOUT_S (`BackendConfig.replay_s`)."""
    return envelope.expiration_ms > MAX_REQUEST_TIMEOUT_S * 1000 and bool(envelope.header.origin)


class Takeover:
    """Takes streams over from runs of other replicas, which may be dead or cut off: they write nothing more from then on."""

    def __init__(self, store: Store, keys: StoreKeys, backend: str, replica_id: str) -> None:
        self._store = store
        self._keys = keys
        self._backend = backend
        self._replica_id = replica_id

    def __repr__(self) -> str:
        return f"<Takeover by {self._replica_id}>"

    async def is_shown(self, envelope: Envelope) -> bool:
        """Whether an earlier run has shown a part of the answer. Raises StoreUnavailable."""
        return await self._store.get(self._keys.owner(envelope.future_id(self._backend))) is not None

    async def of(self, envelope: Envelope, config: BackendConfig) -> Outgoing | Result | None:
        """Returns the stream that this run continues, or the result that ends it, or None if no part of the answer was shown. Raises
        StoreUnavailable, also if another replica was faster."""
        future_id = envelope.future_id(self._backend)
        key = self._keys.owner(future_id)
        raw = await self._store.get(key)
        if raw is None:
            return None
        before = _read_owner(raw, self._backend)
        replays = config.on_death == "replay" and before.replays  # else its frames may be joined ones, which no run makes again
        owner = Owner.new(self._replica_id, before.attempt + 1, self._backend, before.endpoint, resumable=before.resumable, replays=replays)
        owner = msgspec.structs.replace(owner, head_alone=before.head_alone)
        ttl_ms = int(max(STREAM_TTL_S, config.stream_idle_timeout_s, config.resume_grace_s) * 1000)
        if not await self._store.replace(key, raw, owner.to_bytes(), ttl_ms=ttl_ms, quiet=True):
            raise StoreUnavailable("another run of the request takes its stream over")
        shown = await self._store.last_of_stream(self._keys.stream(future_id))
        if not replays:
            return lost_result(self._backend, shown)
        return Outgoing(future_id, owner, envelope.header.inbox, config, shown=shown)


def behind_shown(result: Result) -> Result:
    """Returns the end of an answer of which a part was shown: an error instead of an answer in one piece, beside which that part would look
    whole."""
    if result.error is not None or not (result.body or result.ref):
        return result
    message = "an earlier run streamed a part of this answer, and the replay returned one in one piece: a replayed handler must yield"
    return Result(status=500, backend=result.backend, error=ErrorInfo(type="mqserve.BadType", message=message))


def _read_owner(raw: bytes, backend: str) -> Owner:
    try:
        return Owner.from_bytes(raw)
    except BadEnvelope:  # of another version, or nobody's
        return Owner("", 0, backend)
