"""Runs one request or one batch through the user's code: a job in, a Result out. Only a cancelled task raises, and nothing waits for a
broker.

Every exception of user code becomes its request's result, also SystemExit, and also one that a returned value raises when it is encoded.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ..broker.envelope import Envelope
from ..broker.errors import BadEnvelope, BadType
from ..broker.failures import name_of, traceback_of
from ..broker.process import forks
from ..broker.process.printable import printable, printable_lines
from ..broker.results import ErrorInfo, Result, ResultLimit
from ..broker.values.carried import read_carried
from ..broker.values.codecs import check_plain, decode_value
from ..broker.values.signing import SealScope, Signer
from .asgi_apps import ASGIApp, HostedApp
from .asgi_responses import Collected, Left, is_whole
from .batch_decorators import split_results
from .error_results import error_result
from .handler import Handler, Method
from .job_words import RetryLater
from .replies import plain_result, response_head, value_result
from .requests import BadBody, Receiver, Request, ServeRequest, convert_params, http_scope
from .sinks import WAIT_LIMIT, Sinks
from .stages import Job, KeptJob

logger = logging.getLogger(__name__)

_RESULTS = frozenset((type(None), bool, int, float, str, bytes, list, dict))  # most results have these types, and need no check

_ALWAYS_TAKEN = 1024 * 1024  # bytes of a result: the limit of no request is lower

AnyGenerator = Generator[Any, Any, Any] | AsyncGenerator[Any, Any]


class BatchSteps(NamedTuple):
    """A generator that yields lists of items, one for each member of its batch."""

    generator: AnyGenerator


Answer = Result | ASGIApp | AnyGenerator | BatchSteps
"""A result, or an ASGI app (a Response is one) that `respond` must run to get one, or a generator whose values are the answer."""


@dataclass(frozen=True, slots=True)
class Execution:
    """Runs the requests of one backend in one replica."""

    backend: str
    handler: Handler
    signer: Signer
    job_limit: ResultLimit = WAIT_LIMIT  # of the results of jobs
    depth: int = field(default_factory=lambda: forks.depth)

    def method(self, job: Job) -> Method | Result:
        """Returns the method to run, or an error as the result if there is none."""
        try:
            meta = job.envelope.header.meta
            if meta.params:
                convert_params(meta)  # here, since later a failure would fail the whole batch
            return self.handler.method(meta.call)
        except BaseException as error:
            return self.failed(error, job)

    # One request.

    def run(self, method: Method, job: Job) -> Answer:
        """Makes a plain call, in the worker's thread or one of its pool."""
        try:
            value = method.function(self.request(job)) if method.takes_request else self._call_bare(method, job)
            return self._answer(value, job)
        except BaseException as error:
            return self.failed(error, job)

    async def run_async(self, method: Method, job: Job) -> Answer:
        """Makes an async call, in a task of the worker's loop. Raises only CancelledError, if the task is cancelled."""
        try:
            value = method.function(self.request(job)) if method.takes_request else self._call_bare(method, job)
            if inspect.isawaitable(value):
                value = await value
            return self._answer(value, job)
        except BaseException as error:
            _raise_if_cancelled(error)
            return self.failed(error, job)

    async def respond(self, app: ASGIApp, job: Job, answer: Callable[[Result], None], sinks: Sinks) -> None:
        """Runs an ASGI app, the backend's or a response, and streams what comes in parts; `answer` gets its result as soon as it is
        complete. Nobody waits for background tasks, which run after that. Raises only CancelledError, if the task is cancelled."""
        collected = Collected(
            lambda whole: answer(self._whole(whole, job)),
            lambda head: sinks.response(job, *response_head(head, self.backend)),
            head_only=job.envelope.header.meta.method == "HEAD",
            at_most=self._limit(job).max_bytes,
            followed=job if isinstance(job, KeptJob) else None,
        )
        try:
            await app(http_scope(job.envelope.header.meta), Receiver(job), collected.send)
            if not collected.is_whole:
                what = f"{app!r}" if isinstance(app, HostedApp) else f"the handler returned a {type(app).__name__} that"
                raise BadType(f"{what} ended before its answer did: {collected!r}")
        except BaseException as error:
            _raise_if_cancelled(error)
            if collected.is_too_large:
                answer(self._too_large(job))
            elif collected.is_whole and isinstance(error, Left | ClientDisconnect):
                pass  # an answer to HEAD was complete with its head
            elif collected.is_whole:
                told = printable_lines(traceback_of(error).rstrip())
                logger.error("after the answer to request %s of %s\n%s", printable(job.envelope.id), self.backend, told)
            else:
                answer(self.failed(error, job))
        finally:
            await self._close_body(app, job)

    async def _close_body(self, response: ASGIApp, job: Job) -> None:
        """Has the generator of a StreamingResponse run its `finally` now: Starlette leaves that to the garbage collector."""
        body = getattr(response, "body_iterator", None)
        if isinstance(body, AsyncGenerator):
            try:
                await body.aclose()
            except BaseException as error:
                _raise_if_cancelled(error)
                self.failed(error, job)  # which logs it

    # A batch.

    def run_batch(self, method: Method, jobs: Sequence[Job]) -> list[Answer]:
        """Makes one plain call for all jobs."""
        try:
            value = method.function([self.request(job) for job in jobs])
            if method.steps_batch:
                return [BatchSteps(value)] * len(jobs)
            values = split_results(value, len(jobs))
        except BaseException as error:
            return [self.failed(error, job) for job in jobs]
        return self._answers(values, jobs)

    async def run_batch_async(self, method: Method, jobs: Sequence[Job]) -> list[Answer]:
        """Makes one async call for all jobs. Raises like `run_async`."""
        try:
            value = method.function([self.request(job) for job in jobs])
            if method.steps_batch:
                return [BatchSteps(value)] * len(jobs)
            values = split_results(await value, len(jobs))
        except BaseException as error:
            _raise_if_cancelled(error)
            return [self.failed(error, job) for job in jobs]
        return self._answers(values, jobs)

    def _answers(self, values: list[Any], jobs: Sequence[Job]) -> list[Answer]:
        answers: list[Answer] = []
        for value, job in zip(values, jobs, strict=True):
            try:
                answers.append(self._answer(value, job))
            except BaseException as error:
                answers.append(self.failed(error, job))
        return answers

    # In: the request.

    def _call_bare(self, method: Method, job: Job) -> Any:
        """Calls a handler that has no parameter."""
        if job.envelope.header.origin == "handle" and self._content(job.envelope) not in ((None, {}), ([None, {}])):
            raise BadType("this handler has no parameter for a request, and remote() was given something to send: leave that out")
        return method.function()

    def request(self, job: Job) -> Request | ServeRequest:
        if job.envelope.header.origin == "http" and not job.envelope.carries:
            job.request = Request(job)
        else:
            job.request = ServeRequest(job, lambda: self._content(job.envelope))
        return job.request

    def _content(self, envelope: Envelope) -> tuple[Any, dict[str, Any]]:
        """Returns (data, keyword arguments)."""
        try:
            if envelope.carries:  # web clients send no pickles, and so their jobs carry none
                return read_carried(envelope.body, self.signer, plain=envelope.header.origin != "handle"), {}
            claim = SealScope("request", self.backend, envelope.id)
            content = decode_value(envelope.body, envelope.content_type, self.signer, claim)
        except BadEnvelope as error:
            raise BadBody(str(error)) from error
        if envelope.header.origin != "handle":
            return content, {}
        if not (isinstance(content, list) and len(content) == 2 and isinstance(content[1], dict)):
            raise BadBody("the mq header says that a handle sent this, and the body is none of a handle's: leave the header out")
        return content[0], content[1]

    # Out: the answer.

    def _answer(self, value: Any, job: Job) -> Answer:
        if type(value) not in _RESULTS:
            if isinstance(value, Response) and not is_whole(value):
                return value
            if isinstance(value, Generator | AsyncGenerator):
                return value
        return self._result(value, job)

    def _whole(self, response: Response, job: Job) -> Result:
        try:
            return self._result(response, job)
        except BaseException as error:
            return self.failed(error, job)

    def _result(self, value: Any, job: Job) -> Result:
        if type(value) not in _RESULTS and inspect.isawaitable(value):
            raise BadType(f"the handler returned a {type(value).__name__}, which is no result: write `async def` and await it")
        envelope = job.envelope
        if envelope.header.origin == "handle":
            result = value_result(value, self.backend, envelope.id, self.signer)
        else:
            result = plain_result(value, self.backend)
        return result if len(result.body) <= _ALWAYS_TAKEN or len(result.body) <= self._limit(job).max_bytes else self._too_large(job)

    def _limit(self, job: Job) -> ResultLimit:
        return self.job_limit if isinstance(job, KeptJob) else WAIT_LIMIT

    def _too_large(self, job: Job) -> Result:
        error = ErrorInfo(type="mqserve.TooLarge", message=self._limit(job).refusal)
        return Result(status=500, backend=self.backend, error=error)

    def failed(self, error: BaseException, job: Job) -> Result:
        """Returns the exception as a result, and logs the traceback of a 500. Raises nothing, whatever the exception is."""
        forks.end_if_forked_since(self.depth, error)
        envelope = job.envelope
        if isinstance(job, KeptJob):
            _note_failure(job, error)
        result = error_result(error, self.backend, envelope.future_id(self.backend), self.signer, lambda: _brought(job.request))
        if result.status == 500 and result.error is not None and result.error.traceback:
            told = printable_lines(result.error.traceback.rstrip())
            logger.error("request %s of %s failed\n%s", printable(envelope.id) or "without an id", self.backend, told)
        return result


def _note_failure(job: KeptJob, error: BaseException) -> None:
    """Notes by which exception a job has failed, for the decision whether it is tried again. Raises nothing."""
    kind = type(error)
    try:
        job.error_names = tuple([name_of(base) for base in type.__dict__["__mro__"].__get__(kind)])  # past a metaclass that may lie
        job.again_after_s = error.after_s if issubclass(kind, RetryLater) else None  # type: ignore[attr-defined]
    except BaseException:
        job.error_names, job.again_after_s = (name_of(kind),), None


def _brought(request: object) -> Mapping[str, Any]:
    """Returns the data that the caller sent, by name."""
    if not isinstance(request, Request | ServeRequest):
        return {}
    try:
        body = request.data
    except BadBody:
        body = request.raw
    return {"body": body, "query": dict(request.query_params), "path": dict(request.path_params)}


def _raise_if_cancelled(error: BaseException) -> None:
    """Raises `error` again if the worker cancelled the task. A CancelledError that the handler raised itself is its result."""
    if issubclass(type(error), asyncio.CancelledError):  # isinstance would ask the exception for its `__class__`
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise error


def check_direct(envelope: Envelope) -> None:
    """Raises BadEnvelope if a direct publisher's body does not parse as its content type. Called before the request takes a slot."""
    if not envelope.header.origin:
        check_plain(envelope.body, envelope.content_type)
