"""Requests that their clients do not wait for, or not for long: sent as jobs, and answered 202."""

from __future__ import annotations

import math
from contextlib import suppress

from ..broker.calls.job_sending import JobSender, JobTerms
from ..broker.calls.sending import RequestSender
from ..broker.envelope import RequestHead, mint_id
from ..broker.errors import MQServeError
from ..broker.jobs import PRIORITIES, JobFacts
from .calls import AsgiCall
from .futures import Futures, Receive, Scope
from .job_views import RETRY_AFTER, new_job_view
from .polls import Polls
from .preferences import Headers, Preference, result_ttl_of
from .responses import Reply, from_result, json_reply


class Jobs:
    """The jobs that come through one proxy."""

    def __init__(self, sender: RequestSender, jobs: JobSender, futures: Futures, polls: Polls, *, debug: bool) -> None:
        self._sender = sender
        self._jobs = jobs
        self._futures = futures
        self._polls = polls
        self._debug = debug

    def __repr__(self) -> str:
        return f"<Jobs over {self._jobs!r}>"

    def terms(self, headers: Headers, begins_within_s: float, priority: str, *, once: bool) -> JobTerms:
        """Returns what the headers of a job say of it. Raises BadValue."""
        expires_ms = 0 if begins_within_s == math.inf else self._sender.now_ms() + math.ceil(begins_within_s * 1000)
        return JobTerms(expires_ms=expires_ms, result_ttl_s=result_ttl_of(headers), priority=PRIORITIES[priority], once=once)

    async def submit(self, future_id: str, backend: str, body: bytes, content_type: str, meta: RequestHead, terms: JobTerms) -> JobFacts:
        """Sends a request as a job. Raises MQServeError if it was not accepted."""
        refusal = self._futures.refusal
        return await self._jobs.submit(future_id, backend, body, content_type, meta, origin="http", terms=terms, refusal=refusal)

    async def answer(self, call: AsgiCall, facts: JobFacts, preference: Preference, scope: Scope, receive: Receive) -> Reply:
        """Returns the answer itself, if the client waits for it and it is there in time, else 202."""
        if preference.wait_s:
            with suppress(MQServeError):  # the job was accepted in any case
                result = await self._polls.until(mint_id(), receive, self._sender.pending.job_result(call.id, preference.wait_s))
                if result is not None:
                    status, headers, body = from_result(result, call.id, debug=self._debug)
                    return status, [*headers, _applied(preference.applied_to_answer)], body
        return await self._promise(call, facts, preference, scope)

    async def _promise(self, call: AsgiCall, facts: JobFacts, preference: Preference, scope: Scope) -> Reply:
        links = self._futures.links(scope)
        view = new_job_view(call.id, facts, links)
        if preference.wait_s:
            with suppress(MQServeError):
                if (record := await self._jobs.look(call.id)) is not None:
                    view = await self._futures.view(record, scope)
        status, headers, body = json_reply(view, 202)
        own = [(b"x-request-id", call.id.encode()), RETRY_AFTER, links.location(call.id), _applied(preference.applied_to_promise)]
        return status, [*headers, *own], body


def _applied(preferences: bytes) -> tuple[bytes, bytes]:
    return b"preference-applied", preferences
