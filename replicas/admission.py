"""Checks requests before they run: those that may have run before, whose body is in the store, or that a stranger sent."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from ..broker import queue_names
from ..broker.dead_letters import Attempt, digest_of
from ..broker.envelope import Envelope, is_endpoint_key, is_minted
from ..broker.errors import BadEnvelope, StoreUnavailable
from ..broker.process.printable import printable
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.result_bodies import with_body
from ..broker.result_files import BodyGone
from ..broker.results import ErrorInfo, Result
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..controller.state.config import BackendConfig
from .execute import check_direct
from .stages import Job
from .takeover import Takeover, is_kept_for_replay

logger = logging.getLogger(__name__)

ALONE_AFTER = 5  # redeliveries
_AFTER_DEADLINE_MS = 60_000
_COUNTERS_TTL_MS = 24 * 3600 * 1000


class Poison(BadEnvelope):
    """The message has cost too many replicas. It becomes a dead letter with the history of its runs."""

    def __init__(self, message: str, attempts: Sequence[Attempt] = ()) -> None:
        super().__init__(message)
        self.attempts = tuple(attempts)


NOT_STARTED = b""
"""Stored in place of a start mark: the replica that had the request requeued it before it ran."""


class LostBody(BadEnvelope):
    """The body should be in the store, and is not. Neither the sender nor the handler caused that."""


class Admission:
    """The checks of one backend. Only requests that need one come here."""

    def __init__(self, namespace: str, backend: str, store: Store, replica_id: str) -> None:
        self._namespace = namespace
        self._backend = backend
        self._store = store
        self._replica_id = replica_id
        self._keys = StoreKeys(namespace)
        self._inboxes = self._keys.inbox("")
        self._takeover = Takeover(store, self._keys, backend, replica_id)
        self._often = RateLimitedLog(logger)

    def __repr__(self) -> str:
        return f"<Admission of {self._backend}>"

    def check_reply_to(self, envelope: Envelope) -> None:
        """Raises BadEnvelope if `reply_to` names a queue of this instance, since a stranger may have sent the message."""
        if queue_names.is_ours(self._namespace, envelope.reply_to):
            raise BadEnvelope(f"reply_to names {envelope.reply_to!r}, a queue of this instance: name a queue of your own")

    def check_keys(self, envelope: Envelope) -> None:
        """Raises BadEnvelope if the header names keys other than an inbox and its own body, even if its sender is trusted."""
        header = envelope.header
        if header.inbox and not header.inbox.startswith(self._inboxes):
            raise BadEnvelope(f"the mq header's inbox names {header.inbox!r}, which is none")
        if header.ref and not (is_minted(envelope.id) and header.ref == self._keys.body(envelope.id)):
            raise BadEnvelope(f"the mq header's ref names {header.ref!r}, which is not this message's body")

    async def admit(
        self, job: Job, config: BackendConfig, *, is_alone: Callable[[], bool], check_copies: bool = False
    ) -> Envelope | Result | None:
        """Returns the envelope to run, with its body and the number of this run; or a result, if the request must not run; or None, if
        another copy of it runs. With at-most-once delivery it stores the job's mark, otherwise it sets `job.suspect`. `is_alone` tells
        whether the replica holds no other request.

        Raises BadEnvelope (or its subclass Poison) for a message to dead-letter, StoreUnavailable if the store cannot be asked.
        """
        envelope, redelivered = job.envelope, job.delivery.redelivered
        future_id = envelope.future_id(self._backend)
        once = config.delivery == "at_most_once"
        if not future_id:
            if once and redelivered:
                raise Poison("it was delivered before and has no id, so nobody can tell whether it ran (delivery is at_most_once)")
        else:
            if (raw := await self._store.get(self._keys.future(future_id))) is not None:
                return await self.result_in(future_id, raw)
            if envelope.header.again and not redelivered and await self._takeover.is_shown(envelope):
                return None  # that run's own message comes again if its replica dies
            if redelivered:
                shown = await self._takeover.of(envelope, config)
                if isinstance(shown, Result):
                    return shown
                job.flow = shown
            if check_copies and not redelivered and not await self._claim(future_id, config):
                return None
            if once and not await self._may_start(envelope, job.mark, came_before=redelivered or envelope.header.again):
                return replica_lost(self._backend)
        if redelivered and not once:
            envelope = msgspec.structs.replace(envelope, attempt=await self._count(job, config.max_attempts, is_alone))
        return await self.ready(envelope)

    async def is_shown(self, envelope: Envelope) -> bool:
        """See `Takeover.is_shown`. False for a request without an id, whose answer is not streamed."""
        return bool(envelope.id) and await self._takeover.is_shown(envelope)

    async def ready(self, envelope: Envelope) -> Envelope:
        """Returns the envelope with its body, checked. Called after its runs were counted, since the check of a body may kill the
        replica."""
        if key := envelope.header.ref:
            body = await self._store.get_large(key)
            if body is None:
                raise LostBody("its body is gone from the store, where it is kept until the request's deadline: send it again")
            envelope = msgspec.structs.replace(envelope, body=body)
        check_direct(envelope)
        return envelope

    def new_mark(self) -> bytes:
        """Returns a new start mark of this replica. Each is unique, so that a replica removes only its own."""
        return msgspec.json.encode(Attempt(self._replica_id, self._store.now_ms(), run=secrets.token_hex(8)))

    def mark_soon(self, envelope: Envelope, mark: bytes) -> None:
        """Stores the start mark of a run under way, together with the next results."""
        self._store.mark(self._keys.start(self._name(envelope)), mark, self._mark_ttl_ms(envelope))

    async def mark(self, envelope: Envelope, mark: bytes) -> None:
        """Stores the start mark of a run that is about to start, at once. Raises StoreUnavailable."""
        await self._store.set(self._keys.start(self._name(envelope)), mark, ttl_ms=self._mark_ttl_ms(envelope))

    async def unmark(self, envelope: Envelope, mark: bytes) -> None:
        """Removes the start mark of a run that did not take place or ended in order, and no other. Raises StoreUnavailable."""
        await self._store.replace(self._keys.start(self._name(envelope)), mark, None, quiet=True)

    async def give_back(self, envelope: Envelope, mark: bytes, *, came_before: bool) -> None:
        """Stores NOT_STARTED. With at-most-once delivery no replica would run the request again without it; otherwise it tells the next one
        that this redelivery is no sign of a poison. Stores nothing if the request `came_before` and was not admitted here: an earlier
        replica may have started it. Raises StoreUnavailable."""
        key, ttl_ms = self._keys.start(self._name(envelope)), self._mark_ttl_ms(envelope)
        if mark and await self._store.replace(key, mark, NOT_STARTED, ttl_ms=ttl_ms, quiet=True):
            return
        if not came_before:
            await self._store.set(key, NOT_STARTED, ttl_ms=ttl_ms, only_new=True)

    async def forget(self, envelope: Envelope) -> None:
        """Deletes the start mark and the counters of an answered message, since another one with the same id or body may come."""
        name = self._name(envelope)
        keys = [self._keys.start(name), self._keys.attempts(name)]
        if envelope.id:
            keys.append(self._keys.redeliveries(name))
        with suppress(StoreUnavailable):
            await self._store.delete(*keys)

    def _name(self, envelope: Envelope) -> str:
        """Returns the name under which its runs are counted: the id of its result or, without an id, a digest of its body."""
        return envelope.future_id(self._backend) or digest_of(self._backend, envelope.body)

    def _mark_ttl_ms(self, envelope: Envelope) -> int:
        """Returns the TTL of a start mark. It ends after the deadline, past which a request never runs again, or after the time for which
        the broker keeps the message for a replay."""
        if is_kept_for_replay(envelope):
            return envelope.expiration_ms + _AFTER_DEADLINE_MS
        deadline_ms = envelope.header.deadline
        return max(1, deadline_ms - self._store.now_ms() + _AFTER_DEADLINE_MS) if deadline_ms else _COUNTERS_TTL_MS

    async def stored(self, envelope: Envelope) -> Result | None:
        """Returns the stored result, which another run of the same request recorded first; None if there is none."""
        future_id = envelope.future_id(self._backend)
        raw = await self._store.get(self._keys.future(future_id))
        return None if raw is None else await self._or_its_loss(future_id, Result.from_bytes(raw))

    async def result_in(self, future_id: str, raw: bytes) -> Result:
        """Returns a stored result of this backend with its body. Raises BadEnvelope as `_ours` does."""
        return await self._or_its_loss(future_id, self._ours(future_id, raw))

    def _ours(self, future_id: str, raw: bytes) -> Result:
        """Parses a stored result. Raises BadEnvelope if it is another backend's: names and callers' ids may have slashes, so two backends
        can share a key. That of an endpoint may be of any of its backends."""
        result = Result.from_bytes(raw)
        if result.backend not in ("", self._backend) and not is_endpoint_key(future_id):
            raise BadEnvelope(f"under its id stands a result of backend {result.backend!r}: use another message_id")
        return result

    async def _or_its_loss(self, future_id: str, result: Result) -> Result:
        """Returns the result with its body, or an error if the body is gone."""
        try:
            return await with_body(self._store, self._keys, future_id, result)
        except BodyGone:
            gone = ErrorInfo(type="mqserve.LostBody", message="the body of the result is gone from the store: send the request again")
            return Result(status=500, backend=self._backend, error=gone)

    async def _claim(self, future_id: str, config: BackendConfig) -> bool:
        """Whether this copy of the request is the one to run: the first that sets the claim (NX)."""
        if await self._store.get(self._keys.start(future_id)):
            return False
        ttl_ms = int(config.request_timeout_s * 1000) + _AFTER_DEADLINE_MS  # copies are gone by then
        return await self._store.set(self._keys.claim(future_id), secrets.token_bytes(16), ttl_ms=ttl_ms, only_new=True)

    async def _may_start(self, envelope: Envelope, mark: bytes, *, came_before: bool) -> bool:
        """Whether this is certainly the first run; if so, `mark` is stored. For a request that `came_before` a missing mark proves nothing,
        since the store may have lost its data, so only NOT_STARTED does. May be repeated if the store's answer was lost."""
        key, ttl_ms = self._keys.start(self._name(envelope)), self._mark_ttl_ms(envelope)
        if not came_before and await self._store.set(key, mark, ttl_ms=ttl_ms, only_new=True):
            return True
        return await self._store.replace(key, NOT_STARTED, mark, ttl_ms=ttl_ms, quiet=True) or await self._store.get(key) == mark

    async def _count(self, job: Job, max_attempts: int, is_alone: Callable[[], bool]) -> int:
        """Returns the number of the next run, and makes the job a suspect unless its last replica noted that it gave it back before it ran.

        An attempt is a run that left a start mark and no result, and nothing else counts as one: whoever waits beside a poison is delivered
        again with it. But a poison that kills its replica before a mark can be written must leave one some time. So after ALONE_AFTER
        redeliveries a request is marked here if it is alone: then no other one can be the cause of the next death.
        """
        envelope, name = job.envelope, self._name(job.envelope)
        start, attempts_key = self._keys.start(name), self._keys.attempts(name)
        raw_mark, raw_attempts = await self._store.get_many([start, attempts_key])
        attempts = _read_attempts(raw_attempts)
        mark = _read_mark(raw_mark) if raw_mark else None
        if mark is not None and mark.replica != self._replica_id:  # ours is of a run that goes on or ended in order
            attempts.append(msgspec.structs.replace(mark, ended="its replica was lost before there was a result"))
            await self._store.set(attempts_key, msgspec.json.encode(attempts), ttl_ms=_COUNTERS_TTL_MS)
            await self._store.delete(start)
        if len(attempts) >= max_attempts:
            raise Poison(
                f"{len(attempts)} runs of it were started and left no result (max_attempts): the replicas that ran it died", attempts
            )
        if raw_mark == NOT_STARTED and not attempts and await self._store.replace(start, NOT_STARTED, None, quiet=True):
            return 1
        job.suspect = True
        redeliveries = await self._store.increment(self._keys.redeliveries(name), _COUNTERS_TTL_MS)
        if redeliveries >= ALONE_AFTER:
            what = f"request {printable(envelope.id)}" if envelope.id else "a message without an id"
            self._often.say(f"{what} of {self._backend} was delivered {redeliveries} times again without a result")
            if is_alone():
                job.mark = self.new_mark()
                await self.mark(envelope, job.mark)
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


def replica_lost(backend: str) -> Result:
    message = "the replica that had this request was lost, and may have started it: it is never run twice (delivery is at_most_once)"
    return Result(status=502, backend=backend, error=ErrorInfo(type="mqserve.ReplicaLost", message=message))
