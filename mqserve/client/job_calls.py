"""The jobs of one client: it sends them, and asks the store about them, on the runtime thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ..broker.callbacks import CallbackRules
from ..broker.calls.chord_calls import VERSION as CHORD_VERSION
from ..broker.calls.chord_calls import ChordCall
from ..broker.calls.group_ends import cancel_group, group_now
from ..broker.calls.idempotency import KEY_TTL_S, MISUSED_BY_HANDLE, VERSION, Claim, IdempotencyKeys, digest_of
from ..broker.calls.job_events import JobFollower
from ..broker.calls.job_sending import EXPIRED_AFTER_MS, JobSender, JobTerms
from ..broker.calls.sending import RequestSender
from ..broker.envelope import Member, RequestHead, mint_id
from ..broker.errors import BrokerUnavailable, InstanceError, MQServeError, StoreUnavailable, UnknownJob
from ..broker.job_groups import GroupFacts, GroupRecord
from ..broker.job_store import NumberedEvent
from ..broker.jobs import PRIORITIES, UNENDED_TTL_S, JobRecord, JobState
from ..broker.pipelines import message_id
from ..broker.results import Result, members_failed
from ..broker.values.codecs import PICKLE, encode_value
from ..broker.values.signing import SealScope
from ..connections import Connections
from ..controller.scheduled_jobs import send_scheduled
from ..controller.state.documents import Desired, Schedule
from ..controller.state.reading import read_observed
from ..controller.state.traffic import choose, entry_of, stages_of
from .futures import Found
from .job_options import JobOptions, timing_of
from .jobs import Job, JobStatus, Kept
from .runtime import Runtime

if TYPE_CHECKING:
    from .sender import Sender

T = TypeVar("T")
_EXPIRED_AFTER_S = EXPIRED_AFTER_MS / 1000 + 1  # a second more, so that looking for such a job finds it expired


@dataclass(frozen=True, slots=True)
class Order:
    """One call of `submit`."""

    id: str
    meta: RequestHead
    shard_key: str
    options: JobOptions
    data: Any
    arguments: dict[str, Any]
    wait_for_endpoint: bool
    plain: bool
    member: Member | None = None


class JobCalls:
    """The jobs of one client, in one process."""

    def __init__(self, sender: Sender, runtime: Runtime, connections: Connections, requests: RequestSender) -> None:
        self._sender = sender
        self._runtime = runtime
        self._store = connections.store
        self._keys = connections.keys
        self._signer = connections.settings.signer
        self._requests = requests
        self.refusal = ""  # why the store is to take no new jobs; the client sets it when the document changes
        self.callbacks: CallbackRules | None = None  # which callback URLs are taken; None: not known yet
        self._once = IdempotencyKeys(connections.store, connections.keys, misuse=MISUSED_BY_HANDLE)
        self._jobs = JobSender(connections.queue, connections.store, connections.keys, requests.held, self._signer)

    def __repr__(self) -> str:
        return f"<JobCalls of {self._requests!r}>"

    def here(self) -> JobCalls:
        """Returns those of the client in this process: a forked child has others."""
        return self._sender.find().jobs

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs the work on the runtime thread, and waits for it here."""
        return self._runtime.call(work)

    async def wait_soon(self, work: Coroutine[Any, Any, T]) -> T:
        """Does the same in a coroutine."""
        return await asyncio.wrap_future(self._runtime.submit(work))

    # Sending.

    def submit(self, order: Order) -> Coroutine[Any, Any, Job]:
        """Returns the work that sends a job, for `wait` and `wait_soon`. Raises what `Sender.send` does."""
        waits = self._sender.has_to_wait(order.meta.endpoint, order.data, order.arguments, wait_for_endpoint=order.wait_for_endpoint)
        return self._submit_later(order) if waits else self.encoded(order)

    async def _submit_later(self, order: Order) -> Job:
        data, arguments = await self._sender.ready(order.meta.endpoint, order.data, order.arguments)
        work = await asyncio.to_thread(self.encoded, replace(order, data=data, arguments=arguments))
        return await work

    def encoded(self, order: Order, claimed: Claim | None = None) -> Coroutine[Any, Any, Job]:
        """Encodes the job in the caller's thread, and returns the work that sends it. `claimed`: it may have been sent before, under that
        id and to that backend."""
        desired, options = self._sender.desired, order.options
        endpoint = self._sender.find_endpoint(desired, order.meta.endpoint)
        first, stages = entry_of(endpoint, desired.endpoints), stages_of(endpoint, order.shard_key)
        backend = choose(first, order.shard_key).backend if claimed is None else claimed.backend
        its = desired.backends.get(backend)
        timing = timing_of(options, self._store.now_ms())
        scope = SealScope("request", backend, message_id(order.id, stages))
        content_type, body = encode_value([order.data, order.arguments], self._signer, scope, timing.openable_ms)
        terms = JobTerms(
            not_before_ms=timing.not_before_ms,
            expires_ms=timing.expires_ms,
            result_ttl_s=math.ceil(options.result_ttl_s or (KEY_TTL_S if options.idempotency_key else 0)),
            priority=PRIORITIES[options.priority],
            tag=options.tag,
            callback=options.callback_url,
            member=order.member,
            once=its is not None and its.config.delivery == "at_most_once",
            again=claimed is not None,
            stages=stages,
        )
        send = self._send_once if options.idempotency_key and claimed is None else self._send
        return send(order, backend, content_type, body, terms)

    async def _send_once(self, order: Order, backend: str, content_type: str, body: bytes, terms: JobTerms) -> Job:
        """Sends it, unless a job with its key was sent before: then that one is returned."""
        scope = digest_of(b"handle", order.meta.endpoint.encode(), order.options.idempotency_key.encode())
        shown = b"" if content_type == PICKLE else body  # two pickles of one value may differ
        claim = Claim(VERSION, order.id, backend, digest_of(order.meta.call.encode(), content_type.encode(), shown))
        while (stands := await self._once.claim(scope, claim, terms.result_ttl_s)) != claim:
            record = await self._jobs.look(stands.id)
            if record is None:  # who claimed the key may have ended before it sent the job; a second message of one id does no harm
                return await (await asyncio.to_thread(self.encoded, replace(order, id=stands.id), stands))
            if record.state is not JobState.EXPIRED:
                return self.job(stands.id, stands.id, plain=order.plain, expires_ms=record.facts.expires_ms)
            await self._once.free(scope, stands)
        try:
            return await self._send(order, backend, content_type, body, terms)
        except MQServeError as error:
            if not (isinstance(error, BrokerUnavailable) and error.maybe_sent):
                with suppress(StoreUnavailable):  # then the same request may still be sent under its id
                    await self._once.free(scope, claim)
            raise

    async def _send(self, order: Order, backend: str, content_type: str, body: bytes, terms: JobTerms) -> Job:
        if terms.callback:
            await self.check_callback(terms.callback)
        await self._jobs.submit(order.id, backend, body, content_type, order.meta, origin="handle", terms=terms, refusal=self.refusal)
        return self.job(order.id, order.id, plain=order.plain, expires_ms=terms.expires_ms)

    async def run_schedule(self, desired: Desired, schedule: Schedule) -> Job:
        """See `Client.run_schedule`."""
        job_id, now_ms = mint_id(), self._store.now_ms()
        facts = await send_scheduled(self._jobs, self._signer, desired, schedule, job_id, now_ms, refusal=self.refusal)
        return self.job(job_id, job_id, expires_ms=facts.expires_ms)

    async def check_callback(self, url: str) -> None:
        """Raises BadValue for a callback URL that the controllers do not allow."""
        (await self._callback_rules()).check(url)

    async def _callback_rules(self) -> CallbackRules:
        if self.callbacks is None:
            self.callbacks = read_observed(await self._store.get(self._keys.observed)).callbacks
        return self.callbacks

    def retry(self, key: str, *, plain: bool) -> Job:
        """See `Job.retry`."""
        return self.wait(self._retry(key, plain))

    async def _retry(self, key: str, plain: bool) -> Job:
        new_id = mint_id()
        facts = await self._jobs.retry(key, new_id, refusal=self.refusal)
        return self.job(new_id, new_id, plain=plain, expires_ms=facts.expires_ms)

    # Asking.

    def job(self, key: str, job_id: str, *, plain: bool = False, expires_ms: int | None = None) -> Job:
        """Returns a job. One of which it is known when it expires (0: never) was sent: it is waited for even if the store has lost it."""
        return Job(job_id, Kept(key, self, plain=plain, expires_ms=expires_ms))

    def status(self, key: str) -> JobStatus:
        """See `Job.status`."""
        return self.wait(self._status(key))

    async def _status(self, key: str) -> JobStatus:
        record = await self._known(key)
        waits = record.state is JobState.QUEUED and not record.facts.stages
        place = await self._store.jobs.place(key, record.facts) if waits else None
        return JobStatus.of(record, place, await self._jobs.stages(record))

    async def _known(self, key: str) -> JobRecord:
        record = await self._jobs.look(key)
        if record is None:
            if await self._store.jobs.group(key) is not None:
                raise UnknownJob(f"{key!r} is the id of a group, not of a job: serve.group({key!r}) finds it")
            raise UnknownJob(
                f"nothing is known of a job {key!r}: nobody sent it, or its record is gone, which stays twice as long as its result; a "
                "publisher's own message_id needs its backend or endpoint, too"
            )
        return record

    def is_done(self, key: str) -> bool:
        """See `Future.done`."""
        return self.wait(self._is_done(key))

    async def _is_done(self, key: str) -> bool:
        record = await self._jobs.look(key)
        return record is not None and record.state.is_final

    def first_result(self, key: str, expires_ms: int | None) -> concurrent.futures.Future[Found]:
        """Returns a future of the result. Cancel it to stop waiting."""
        return self._runtime.submit(self._first_result(key, expires_ms))

    async def _first_result(self, key: str, expires_ms: int | None) -> Found:
        if expires_ms is None:
            expires_ms = (await self._known(key)).facts.expires_ms
        if expires_ms:
            left_s = (expires_ms - self._store.now_ms()) / 1000
            with suppress(TimeoutError):
                return key, await self._requests.pending.job_result(key, max(0.0, left_s) + _EXPIRED_AFTER_S)
            await self._jobs.look(key)  # nobody else may notice that it was not begun in time
        return key, await self._requests.pending.job_result(key, None)

    def cancel(self, key: str) -> bool:
        """See `Future.cancel`. Raises UnknownJob."""
        return self.wait(self._cancel(key))

    async def _cancel(self, key: str) -> bool:
        try:
            return await self._jobs.cancel(key)
        except UnknownJob:
            await self._known(key)  # raises, and tells a group from an id that nobody has
            raise

    async def cancel_soon(self, key: str) -> None:
        """Does the same for a caller that has gone."""
        with suppress(UnknownJob, StoreUnavailable):
            await self._jobs.cancel(key)

    def read(self, key: str, result: Result, *, plain: bool) -> Any:
        """See `Sender.read`."""
        return self._sender.read(key, result, plain=plain)

    # Groups.

    def group_of(self, total: int, order: Order, then: str) -> GroupFacts:
        """Returns what is to be known of a group of such jobs. `then` is the id of the job that gets their results."""
        now_ms = self._store.now_ms()
        return GroupFacts(total, order.meta.endpoint, now_ms, timing_of(order.options, now_ms).expires_ms, then)

    def chord_call(self, order: Order) -> ChordCall:
        """Returns the job that gets all results of a group, as the group keeps it. Raises what `submit` does."""
        self._sender.has_to_wait(order.meta.endpoint, None, {}, wait_for_endpoint=order.wait_for_endpoint)
        options, now_ms = order.options, self._store.now_ms()
        timing = timing_of(options, now_ms)
        return ChordCall(
            CHORD_VERSION, order.id, order.meta, order.shard_key, PRIORITIES[options.priority], options.tag, options.callback_url,
            math.ceil(options.result_ttl_s or 0), now_ms, timing.not_before_ms, timing.expires_ms,
        )  # fmt: skip

    async def keep_group(self, group_id: str, facts: GroupFacts, call: ChordCall | None) -> None:
        """Writes the record of a group, and that of the job that gets its results."""
        raw = b""
        if call is not None:
            if call.callback:
                await self.check_callback(call.callback)
            await self._store.jobs.hold(call.id, call.facts)
            raw = call.sealed(self._signer, group_id)
        await self._store.jobs.keep_group(group_id, facts, raw)

    async def fail_chord(self, chord_id: str, why: str) -> None:
        """Ends the job that was to get the results of a group, which will not have them."""
        await self._jobs.fail(chord_id, members_failed(why))

    async def group(self, group_id: str) -> GroupRecord:
        """Returns what is known of a group, after those of its jobs that were not begun in time have been ended. Raises UnknownJob."""
        record = await group_now(self._jobs, group_id)
        if record is None:
            raise UnknownJob(
                f"nothing is known of a group {group_id!r}: nobody sent it, or none of its jobs has ended for {UNENDED_TTL_S // 86400} days"
            )
        return record

    async def cancel_group(self, group_id: str, facts: GroupFacts) -> int:
        """See `Group.cancel`."""
        return await cancel_group(self._jobs, group_id, facts)

    # Following.

    async def follow(self, key: str, after: int) -> JobFollower:
        """Begins to follow the events of a job, on the runtime thread; `stop` ends that."""
        await self._known(key)
        return await self._requests.pending.followers.follow(key, after)

    async def next_event(self, following: JobFollower) -> NumberedEvent | None:
        """Returns the next event; None behind the last one."""
        event = await anext(following, None)
        if event is None and not following.has_ended:
            raise InstanceError(self._sender.over or "the client follows no jobs any more")
        return event

    def stop(self, following: JobFollower) -> None:
        """Ends following, from any thread."""
        self._sender.post(lambda: self._requests.pending.followers.leave(following))
