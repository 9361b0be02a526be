"""Jobs that direct publishers send to an endpoint: the leader chooses the backend of each, by the endpoint's traffic, and publishes it
there.

The leader vouches for nothing in them: a header that claims more than any publisher may say is refused here, and replicas decode the rest
as a direct publisher's. What it adds of its own is the endpoint, by which a job is found again whatever backend runs it.
"""

from __future__ import annotations

import logging
from functools import partial

from msgspec.structs import replace

from ..broker.amqp_replies import send_reply
from ..broker.dead_letters import Death
from ..broker.envelope import Envelope, Header, JobHead, RequestHead, endpoint_key
from ..broker.errors import BadEnvelope, BadSignature, BadValue, MQServeError, NotRouted, StoreUnavailable
from ..broker.jobs import JOB_RESULT_TTL_S, JobEnd, JobState, facts_of
from ..broker.later import DueJob, Later
from ..broker.process.printable import printable
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.queue import Queue, fate_of
from ..broker.queue_names import ENDPOINTS, check_name, is_ours
from ..broker.results import ErrorInfo, Result, entry_of
from ..broker.store import Store, recorded
from ..broker.store_keys import StoreKeys
from ..broker.values.codecs import PICKLE, media_type
from .latest_document import LatestDocument
from .state.documents import Desired, Endpoint
from .state.traffic import choose

logger = logging.getLogger(__name__)

AGAIN_S = 1.0  # until a backend without a queue is looked at again
_CONFIRM_BUDGET_S = 10.0


class UnknownTarget(BadEnvelope):
    """It was published to an endpoint that does not exist."""

    status = 404


class EndpointJobs:
    """Sends on what was published to endpoints."""

    def __init__(self, namespace: str, queue: Queue, store: Store, keys: StoreKeys) -> None:
        self._namespace = namespace
        self._queue = queue
        self._later: Later = queue.later
        self._store = store
        self._document = LatestDocument(store, keys)
        self._refused, self._unrecorded, self._untold = RateLimitedLog(logger), RateLimitedLog(logger), RateLimitedLog(logger)

    def __repr__(self) -> str:
        return f"<EndpointJobs by {self._document!r}>"

    def follow(self, desired: Desired) -> None:
        """Learns the document as the controller has read it last."""
        self._document.follow(desired)

    async def send_on(self, job: DueJob, name: str) -> None:
        """Returns once the broker has the job among those of a backend, or among the dead letters, after its sender was told. Raises the
        errors of broker and store."""
        try:
            endpoint = await self._find(name)
            await self._forward(endpoint, check_published(job.envelope(), self._namespace), tells=job.wants_events)
        except BadEnvelope as error:
            await self._refuse(job, name, error)

    async def _find(self, name: str) -> Endpoint:
        """Raises UnknownTarget."""
        try:
            check_name(name, "an endpoint")
        except BadValue as error:
            raise UnknownTarget(f"its routing key names no endpoint: {error}") from error
        found = (await self._document.with_endpoint(name)).endpoints.get(name)
        if found is None:
            raise UnknownTarget(f"there is no endpoint {name!r}: its routing key has to be the name of one that is deployed")
        if found.stages:
            raise BadEnvelope(f"{name!r} is a pipeline, which takes requests of HTTP and of handles: publish to the endpoint of a stage")
        return found

    async def _forward(self, endpoint: Endpoint, published: Envelope, *, tells: bool) -> None:
        backend, _ = choose(endpoint, published.id)  # by the id, so that a second copy goes the same way
        envelope = _forwarded(published, endpoint.name, self._store.now_ms(), tells=tells)
        error = await fate_of(partial(self._queue.publish_job, backend, envelope), _CONFIRM_BUDGET_S)
        if isinstance(error, NotRouted):  # its queue is about to be declared, and jobs of others must not wait for that
            error = await fate_of(partial(self._queue.publish_later, backend, envelope, AGAIN_S), _CONFIRM_BUDGET_S)
        if error is not None:
            raise error
        if envelope.id and not envelope.expiration_ms:  # one that expires would leave a record which nothing ends
            await self._note(backend, envelope)

    async def _note(self, backend: str, envelope: Envelope) -> None:
        """Writes the record of a job that the broker has. If the store cannot take it, the replica writes it when it begins the job."""
        facts = facts_of(backend, envelope, self._store.now_ms())
        try:
            await recorded(partial(self._store.jobs.add_then, envelope.future_id(backend)), facts)
        except StoreUnavailable as error:
            self._unrecorded.say(f"jobs to endpoints have no record until they begin: {error}")

    async def _refuse(self, job: DueJob, name: str, error: BadEnvelope) -> None:
        """Sets the message aside, then records its end and tells its sender. If that fails, the dead letter stays, and must not become a
        second one."""
        shown = f"`mqserve dead list {ENDPOINTS}` shows all"
        self._refused.say(f"a message to endpoint {printable(name)} is a dead letter ({shown}): {printable(str(error))}")
        await self._later.set_aside(job, Death(str(error), died_at_ms=self._store.now_ms()))
        try:
            published = job.envelope()
        except BadEnvelope:
            return  # as for any message whose header does not parse: nobody knows what its sender meant
        status = error.status if isinstance(error, UnknownTarget) else 422
        kind = "UnknownEndpoint" if isinstance(error, UnknownTarget) else type(error).__name__
        result = Result(status=status, error=ErrorInfo(type=f"mqserve.{kind}", message=str(error)))
        try:
            if published.id and _is_name(name):
                await self._end(name, published, result)
            if published.reply_to and not is_ours(self._namespace, published.reply_to):
                await send_reply(self._queue, ENDPOINTS, published, result, _CONFIRM_BUDGET_S)
        except MQServeError as failure:
            self._untold.say(f"the sender of a message to an endpoint is not told that it was refused: {failure}")

    async def _end(self, name: str, published: Envelope, result: Result) -> None:
        """Records the end, unless a message of this id has been accepted before: then that one's counts."""
        future_id = endpoint_key(name, published.id)
        if await self._store.jobs.read(future_id) is not None:
            return
        raw = result.to_bytes()
        end = JobEnd(
            future_id, raw, entry_of(future_id, raw), JobState.FAILED, result.status, "", self._store.now_ms(), JOB_RESULT_TTL_S * 1000,
            endpoint=name, callback=_callback_of(published),
        )  # fmt: skip
        await recorded(self._store.jobs.end_then, end)


def check_published(published: Envelope, namespace: str) -> Envelope:
    """Raises BadEnvelope for what nobody may send to an endpoint."""
    if is_ours(namespace, published.reply_to):
        raise BadEnvelope(f"reply_to names {published.reply_to!r}, a queue of this instance: name a queue of your own")
    if published.header.claims:
        raise BadSignature("the mq header says more than a direct publisher may (deadline, meta.call, job.callback): leave the header out")
    if media_type(published.content_type) == PICKLE:
        raise BadEnvelope("a pickle from a direct publisher is never opened: send JSON, MessagePack, text or bytes")
    return published


def _is_name(name: str) -> bool:
    try:
        return bool(check_name(name, "an endpoint"))
    except BadValue:
        return False


def _callback_of(published: Envelope) -> str:
    """Returns the URL that is told of the end, which is the one thing that any publisher may say of a job."""
    return published.header.job.callback if published.header.job is not None and not published.header.claims else ""


def _forwarded(published: Envelope, endpoint: str, now_ms: int, *, tells: bool) -> Envelope:
    """Returns the message to its backend. The queue for the answer is in the header, too, which the seal covers: a sealed message that
    asks for an answer elsewhere is refused."""
    job = JobHead(created_ms=now_ms, callback=_callback_of(published), reply_to=published.reply_to, tells=tells)
    meta = RequestHead(endpoint=endpoint, call=published.header.meta.call)
    header = Header(job=job, meta=meta, deadline=published.header.deadline)
    return replace(published, header=header, persistent=True)
