"""Whether a request is to run that may have been run before, whose body is elsewhere, or that is a stranger's."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import msgspec

from ..broker import queue_names
from ..broker.dead_letters import Attempt, digest_of
from ..broker.envelope import Envelope, is_minted
from ..broker.errors import BadEnvelope, StoreUnavailable
from ..broker.result_bodies import BodyGone, with_body
from ..broker.results import ErrorInfo, Result
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..controller.state.config import BackendConfig
from .execute import check_direct

MAX_REDELIVERIES = 20  # whatever happened to them
_AFTER_DEADLINE_MS = 60_000
_COUNTERS_TTL_MS = 24 * 3600 * 1000


class Poison(BadEnvelope):
    """A message that has cost too many replicas: set aside, with the history of its runs."""

    def __init__(self, message: str, attempts: Sequence[Attempt] = ()) -> None:
        super().__init__(message)
        self.attempts = tuple(attempts)


NOT_STARTED = b""
"""Stands in place of a start mark: whoever had the request gave it back before it ran."""


class LostBody(BadEnvelope):
    """The body was to be in the store, and is not: nobody's fault who sent or runs it."""


class Admission:
    """One backend's checks; only requests that need one come here."""

    def __init__(self, namespace: str, backend: str, store: Store, replica_id: str) -> None:
        self._namespace = namespace
        self._backend = backend
        self._store = store
        self._replica_id = replica_id
        self._keys = StoreKeys(namespace)

    def __repr__(self) -> str:
        return f"<Admission of {self._backend}>"

    def check_reply_to(self, envelope: Envelope) -> None:
        """Raises BadEnvelope for a queue of ours: a message may be anybody's."""
        if queue_names.is_ours(self._namespace, envelope.reply_to):
            raise BadEnvelope(f"reply_to names {envelope.reply_to!r}, a queue of this instance: name a queue of your own")

    def check_keys(self, envelope: Envelope) -> None:
        """Raises BadEnvelope for a header, though believed, that names other keys than an inbox and its own body."""
        header = envelope.header
        if header.inbox and not header.inbox.startswith(self._keys.inbox("")):
            raise BadEnvelope(f"the mq header's inbox names {header.inbox!r}, which is none")
        if header.ref and not (is_minted(envelope.id) and header.ref == self._keys.body(envelope.id)):
            raise BadEnvelope(f"the mq header's ref names {header.ref!r}, which is not this message's body")

    async def admit(
        self, envelope: Envelope, config: BackendConfig, mark: bytes, *, redelivered: bool, check_copies: bool = False
    ) -> Envelope | Result | None:
        """What is to run, with its body and the number of this run; or the result that stands in its place; or None for a copy of what
        another one runs. Delivered at most once, it is marked as started with `mark`.

        Raises BadEnvelope (Poison among them) for what is to be set aside, StoreUnavailable when it cannot be told.
        """
        future_id = envelope.future_id(self._backend)
        once = config.delivery == "at_most_once"
        if not future_id:
            if once and redelivered:
                raise Poison("it was delivered before and has no id, so nobody can tell whether it ran (delivery is at_most_once)")
            if redelivered:
                envelope = replace(envelope, attempt=await self._count(self._name(envelope), config.max_attempts, math.inf))
            return await self._ready(envelope)
        if (raw := await self._store.get(self._keys.future(future_id))) is not None:
            return await self._or_its_loss(future_id, self._ours(raw))
        if check_copies and not redelivered and not await self._claim(future_id, config):
            return None
        if once:
            if not await self._may_start(envelope, mark, came_before=redelivered or envelope.header.again):
                return _lost(self._backend)
        elif redelivered:
            envelope = replace(envelope, attempt=await self._count(future_id, config.max_attempts, MAX_REDELIVERIES))
        return await self._ready(envelope)

    async def _ready(self, envelope: Envelope) -> Envelope:
        """With its body, which is what it says it is. After its runs were counted: what this does with a body may end the replica."""
        if key := envelope.header.ref:
            body = await self._store.get_large(key)
            if body is None:
                raise LostBody("its body is gone from the store, where it is kept until the request's deadline: send it again")
            envelope = replace(envelope, body=body)
        check_direct(envelope)
        return envelope

    def new_mark(self) -> bytes:
        """Says that a run of this replica has started; no two are alike, so that each takes only its own away."""
        return msgspec.json.encode(Attempt(self._replica_id, self._store.now_ms(), run=secrets.token_hex(8)))

    def mark_soon(self, envelope: Envelope, mark: bytes) -> None:
        """That a run is under way, with the next write of results."""
        self._store.mark(self._keys.start(self._name(envelope)), mark, self._mark_ttl_ms(envelope))

    async def mark(self, envelope: Envelope, mark: bytes) -> None:
        """That a run is about to start, at once. Raises StoreUnavailable."""
        await self._store.set(self._keys.start(self._name(envelope)), mark, ttl_ms=self._mark_ttl_ms(envelope))

    async def unmark(self, envelope: Envelope, mark: bytes) -> None:
        """The run did not take place, or was ended in order; another's mark stays. Raises StoreUnavailable."""
        await self._store.replace(self._keys.start(self._name(envelope)), mark, None, quiet=True)

    async def give_back(self, envelope: Envelope, mark: bytes, *, came_before: bool) -> None:
        """Leaves word that it was not started, of a request that is delivered at most once: without it nobody would run it again. Of one
        that came before and was not admitted, nobody here can say so. Raises StoreUnavailable."""
        key, ttl_ms = self._keys.start(self._name(envelope)), self._mark_ttl_ms(envelope)
        if mark and await self._store.replace(key, mark, NOT_STARTED, ttl_ms=ttl_ms, quiet=True):
            return
        if not came_before:
            await self._store.set(key, NOT_STARTED, ttl_ms=ttl_ms, only_new=True)

    async def forget(self, envelope: Envelope) -> None:
        """What is known of the runs of a message without an id, or with its sender's own, once it was answered: its like may come again."""
        name = self._name(envelope)
        keys = [self._keys.start(name), self._keys.attempts(name)]
        if envelope.id:
            keys.append(self._keys.redeliveries(name))
        with suppress(StoreUnavailable):
            await self._store.delete(*keys)

    def _name(self, envelope: Envelope) -> str:
        """What its runs are counted under: where its result stands, or, without an id, what it says."""
        return envelope.future_id(self._backend) or digest_of(self._backend, envelope.body)

    def _mark_ttl_ms(self, envelope: Envelope) -> int:
        """Past its deadline a request is not run again in any case."""
        deadline_ms = envelope.header.deadline
        return max(1, deadline_ms - self._store.now_ms() + _AFTER_DEADLINE_MS) if deadline_ms else _COUNTERS_TTL_MS

    async def stored(self, envelope: Envelope, ours: Result) -> Result:
        """The result that counts, where another run of the same request was first."""
        future_id = envelope.future_id(self._backend)
        raw = await self._store.get(self._keys.future(future_id))
        return ours if raw is None else await self._or_its_loss(future_id, Result.from_bytes(raw))

    def _ours(self, raw: bytes) -> Result:
        """Raises BadEnvelope for another backend's: names may hold a slash, and so may a caller's own id."""
        result = Result.from_bytes(raw)
        if result.backend not in ("", self._backend):
            raise BadEnvelope(f"under its id stands a result of backend {result.backend!r}: use another message_id")
        return result

    async def _or_its_loss(self, future_id: str, result: Result) -> Result:
        """With its body, or the error of one that has lost it."""
        try:
            return await with_body(self._store, self._keys, future_id, result)
        except BodyGone:
            gone = ErrorInfo(type="mqserve.LostBody", message="the body of the result is gone from the store: send the request again")
            return Result(status=500, backend=self._backend, error=gone)

    async def _claim(self, future_id: str, config: BackendConfig) -> bool:
        """Whether this delivery is the one of its copies that runs."""
        if await self._store.get(self._keys.start(future_id)):
            return False
        ttl_ms = int(config.request_timeout_s * 1000) + _AFTER_DEADLINE_MS  # copies are gone by then
        return await self._store.set(self._keys.claim(future_id), secrets.token_bytes(16), ttl_ms=ttl_ms, only_new=True)

    async def _may_start(self, envelope: Envelope, mark: bytes, *, came_before: bool) -> bool:
        """Whether this is its first run, for certain; it is marked as started then. A mark may be lost with the store's data, so what came
        before needs a word of the one who had it. May be asked again, after an answer that was lost."""
        key, ttl_ms = self._keys.start(self._name(envelope)), self._mark_ttl_ms(envelope)
        if not came_before and await self._store.set(key, mark, ttl_ms=ttl_ms, only_new=True):
            return True
        return await self._store.replace(key, NOT_STARTED, mark, ttl_ms=ttl_ms, quiet=True) or await self._store.get(key) == mark

    async def _count(self, name: str, max_attempts: int, max_redeliveries: float) -> int:
        """The number of the run to come. An attempt is a run that was started (it left a mark) and left no result.

        Messages without an id that say the same share a name, so that their redeliveries tell nothing of any one of them.
        """
        start, attempts_key = self._keys.start(name), self._keys.attempts(name)
        raw_mark, raw_attempts = await self._store.get_many([start, attempts_key])
        attempts = _read_attempts(raw_attempts)
        mark = _read_mark(raw_mark) if raw_mark else None
        if mark is not None and mark.replica != self._replica_id:  # ours is of a run that lives, or was ended in order
            attempts.append(msgspec.structs.replace(mark, ended="its replica was lost before there was a result"))
            await self._store.set(attempts_key, msgspec.json.encode(attempts), ttl_ms=_COUNTERS_TTL_MS)
            await self._store.delete(start)
        redeliveries = await self._store.increment(self._keys.redeliveries(name), _COUNTERS_TTL_MS)
        if len(attempts) >= max_attempts:
            raise Poison(
                f"{len(attempts)} runs of it were started and left no result (max_attempts): the replicas that ran it died", attempts
            )
        if redeliveries >= max_redeliveries:
            raise Poison(f"it was delivered {redeliveries} times again and never finished", attempts)
        return len(attempts) + 1


def _read_mark(raw: bytes) -> Attempt:
    try:
        return msgspec.json.decode(raw, type=Attempt)
    except msgspec.MsgspecError:  # another version's
        return Attempt("", 0)


def _read_attempts(raw: bytes | None) -> list[Attempt]:
    try:
        return msgspec.json.decode(raw, type=list[Attempt]) if raw else []
    except msgspec.MsgspecError:
        return []


def _lost(backend: str) -> Result:
    message = "the replica that had this request was lost, and may have started it: it is never run twice (delivery is at_most_once)"
    return Result(status=502, backend=backend, error=ErrorInfo(type="mqserve.ReplicaLost", message=message))
