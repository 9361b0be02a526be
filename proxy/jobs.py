"""Requests that are sent as jobs: those that their clients do not wait for, or not for long, and those that may be sent again."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from ..broker.callbacks import NO_CALLBACKS
from ..broker.calls.idempotency import KEY_TTL_S, Claim, IdempotencyKeys, frees_key
from ..broker.calls.job_sending import JobSender, JobTerms
from ..broker.calls.sending import RequestSender
from ..broker.calls.submission import OnSubmitted, Submission
from ..broker.envelope import RequestHead, mint_id
from ..broker.errors import BadValue, BrokerUnavailable, MQServeError, ResultGone
from ..broker.jobs import MAX_EXPIRES_S, PRIORITIES, JobFacts
from ..broker.pipelines import Stages
from ..broker.results import Result
from .futures import Futures
from .idempotency import REPLAYED, KeyedCall
from .job_views import Links, new_job_view
from .polls import Polls
from .preferences import Headers, Preference, callback_of, not_before_of, result_ttl_of
from .responses import Reply, problem
from .stored_bodies import AnyReply, reply_of

Receive = Callable[[], Awaitable[Any]]


@dataclass(slots=True)
class JobCall:
    """A request on its way to be a job. Its client waits for `wait_s`; without a preference it waits as for any request, and hears of no
    job. The body is given up when it is sent: what waits for an answer holds none."""

    id: str
    backend: str
    body: bytes
    content_type: str
    meta: RequestHead
    terms: JobTerms
    preference: Preference | None
    wait_s: float
    links: Links
    is_keyed: bool = False


class Jobs:
    """The jobs that come through one proxy."""

    def __init__(
        self, sender: RequestSender, jobs: JobSender, keys: IdempotencyKeys, futures: Futures, polls: Polls, *, debug: bool
    ) -> None:
        self._sender = sender
        self._jobs = jobs
        self._keys = keys
        self._futures = futures
        self._polls = polls
        self._debug = debug
        self.callbacks = NO_CALLBACKS

    def __repr__(self) -> str:
        return f"<Jobs over {self._jobs!r}>"

    async def settle(self) -> None:
        """Until those that are on their way have been accepted, or not."""
        await self._jobs.settle()

    def terms(
        self, headers: Headers, begins_within_s: float, priority: str, *, once: bool, is_awaited: bool, stages: Stages | None
    ) -> JobTerms:
        """Returns what the headers of a job say of it. One whose client waits as for any request goes first, unless it says otherwise.
        Raises BadValue."""
        now_ms = self._sender.now_ms()
        if begins_within_s > MAX_EXPIRES_S:
            if begins_within_s < math.inf and not is_awaited:
                raise BadValue(f"X-Request-Timeout-Seconds of a job is at most {MAX_EXPIRES_S} (365 days): leave it out if it may wait")
            begins_within_s = math.inf  # a client that waits may allow more than its backend does
        expires_ms = 0 if begins_within_s == math.inf else now_ms + math.ceil(begins_within_s * 1000)
        not_before_ms = not_before_of(headers, now_ms)
        if 0 < expires_ms <= not_before_ms:
            raise BadValue("X-Not-Before is later than X-Request-Timeout-Seconds allows the job to begin: raise that, or leave it out")
        level = PRIORITIES["high" if is_awaited and priority == "normal" else priority]
        callback = callback_of(headers)
        if callback:
            self.callbacks.check(callback)
        return JobTerms(not_before_ms, expires_ms, result_ttl_of(headers), level, callback=callback, once=once, stages=stages)

    def begin(self, call: JobCall, ended: OnSubmitted) -> None:
        """Sends a request whose client waits for the promise alone, and whose body is no large one. `ended` is called once, perhaps before
        this returns, and must not raise. Raises what speaks against sending it at all."""
        submission = self._submission(call)
        call.body = b""
        submission.begin(ended)

    async def serve(self, call: JobCall, receive: Receive) -> AnyReply:
        """Sends the request. Returns the answer itself, if the client waits for it and it is there in time, else 202. Raises MQServeError
        for a job that was not accepted."""
        facts = await self._submission(call)
        return await self._answer(call, facts, await self._awaited(call, receive))

    async def serve_keyed(self, call: JobCall, keyed: KeyedCall, receive: Receive) -> AnyReply:
        """Does the same, unless a request with this key was sent before: then its answer is returned. An answer that says "try again" frees
        the key."""
        call.is_keyed = True
        ttl_s = call.terms.result_ttl_s or KEY_TTL_S
        call.terms = replace(call.terms, result_ttl_s=ttl_s)  # as long as the key names it
        while (claim := await self._keys.claim(keyed.scope, keyed.claim, ttl_s)) != keyed.claim:
            found = await self._sender.pending.peek(claim.id)
            if found is None or not frees_key(found):
                return await self._serve_again(call, keyed, claim, found, receive)
            await self._keys.free(keyed.scope, claim)
        try:
            facts = await self._submission(call)
        except MQServeError as error:
            if not (isinstance(error, BrokerUnavailable) and error.maybe_sent):
                await self._free(keyed, claim)
            raise
        return await self._answer_keyed(call, facts, keyed, claim, receive)

    async def _serve_again(self, call: JobCall, keyed: KeyedCall, claim: Claim, found: Result | None, receive: Receive) -> AnyReply:
        call.id, call.backend, call.terms = claim.id, claim.backend, replace(call.terms, again=True)
        if found is not None:
            status, headers, body = await self._reply_of(call, found)
        else:
            record = await self._jobs.look(call.id)
            if record is not None and record.state.is_final and not record.has_result:
                raise ResultGone(f"the request with this key has {record.state}, and its result is not kept any more: make a new key")
            # without a record nobody knows whether the first one was sent at all
            facts = await self._submission(call) if record is None else record.facts
            status, headers, body = await self._answer_keyed(call, facts, keyed, claim, receive)
        return status, [*headers, REPLAYED], body

    async def _answer_keyed(self, call: JobCall, facts: JobFacts, keyed: KeyedCall, claim: Claim, receive: Receive) -> AnyReply:
        result = await self._awaited(call, receive)
        if result is not None and frees_key(result):
            await self._free(keyed, claim)
        return await self._answer(call, facts, result)

    async def _free(self, keyed: KeyedCall, claim: Claim) -> None:
        """One that cannot be freed frees itself: whoever finds its answer does it."""
        with suppress(MQServeError):
            await self._keys.free(keyed.scope, claim)

    def _submission(self, call: JobCall) -> Submission:
        return self._jobs.submit(
            call.id, call.backend, call.body, call.content_type, call.meta, origin="http", terms=call.terms, refusal=self._futures.refusal
        )

    async def _awaited(self, call: JobCall, receive: Receive) -> Result | None:
        """Returns the result, if the client waits for it and it is there in time. The job was accepted in any case."""
        call.body = b""
        if not call.wait_s:
            return None
        with suppress(MQServeError):
            return await self._polls.until(mint_id(), receive, self._sender.pending.job_result(call.id, call.wait_s))
        return None

    async def _answer(self, call: JobCall, facts: JobFacts, result: Result | None) -> AnyReply:
        if result is not None:
            return await self._reply_of(call, result)
        return self._not_in_time(call) if call.preference is None else await self._promised(call, facts)

    async def _reply_of(self, call: JobCall, result: Result) -> AnyReply:
        status, headers, body = await reply_of(self._jobs.store.files, call.id, result, call.id, debug=self._debug)
        if call.preference is not None and call.wait_s:
            headers.append((b"preference-applied", call.preference.applied_to_answer))
        return status, headers, body

    async def _promised(self, call: JobCall, facts: JobFacts) -> Reply:
        if call.wait_s or call.terms.again:  # it may have begun
            with suppress(MQServeError):
                if (record := await self._jobs.look(call.id)) is not None:
                    return _promise(call, await self._futures.view(record, call.links))
        return promise(call, facts)

    def _not_in_time(self, call: JobCall) -> Reply:
        mend = "ask again with the same Idempotency-Key" if call.is_keyed else f"ask for {call.links.state(call.id)}"
        if self._polls.are_ending:
            return problem(503, f"this proxy ends before there is an answer: {mend}", call.id, retry_after_s=1)
        return problem(504, f"there is no answer yet, and the request goes on: {mend}", call.id, retry_after_s=1)


def promise(call: JobCall, facts: JobFacts) -> Reply:
    """Returns 202 for a job that was accepted now."""
    return _promise(call, new_job_view(call.id, facts, call.links))


def _promise(call: JobCall, view: dict[str, Any]) -> Reply:
    """Returns 202 for a job with this view."""
    assert call.preference is not None, "a promise is made to those who prefer it"
    status, headers, body = call.links.promise(view)
    headers += ((b"x-request-id", call.id.encode()), (b"preference-applied", call.preference.applied_to_promise))
    return status, headers, body
