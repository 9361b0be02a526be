"""One request through the user's code: an envelope in, a Result out; nothing here raises, and nothing here waits for a broker."""

from __future__ import annotations

import asyncio
import inspect
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from starlette.responses import StreamingResponse

from ..broker.caller import MAX_BODY_BYTES
from ..broker.codecs import check_plain, decode_value
from ..broker.envelope import Envelope
from ..broker.errors import BadEnvelope, BadType
from ..broker.results import ErrorInfo, Result
from ..broker.signing import Claim, Signer
from .batching import split_results
from .handler import Handler, Method
from .replies import collect_stream, error_result, plain_result, value_result
from .requests import BadBody, Request, ServeRequest, convert_params

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Execution:
    """What it takes to run requests of one backend in one replica."""

    backend: str
    handler: Handler
    signer: Signer

    def method(self, envelope: Envelope) -> Method | Result:
        """What is to run, or the result of there being no such method."""
        try:
            convert_params(envelope.header.meta)  # here, or one that does not convert would fail the batch it is in
            return self.handler.method(envelope.header.meta.call)
        except Exception as error:
            return self._failed(error, envelope)

    def run(self, method: Method, envelope: Envelope) -> Result:
        """A plain call; for the worker's thread."""
        try:
            value = method.function(self.request(envelope))
            if isinstance(value, StreamingResponse):
                with ThreadPoolExecutor(1) as other:  # this thread has a running loop
                    value = other.submit(asyncio.run, collect_stream(value)).result()
            return self._result(value, envelope)
        except BaseException as error:
            _raise_if_stopped(error)
            return self._failed(error, envelope)

    async def run_async(self, method: Method, envelope: Envelope) -> Result:
        """An async call, or a plain one that returned an awaitable; for the worker's loop."""
        try:
            value = method.function(self.request(envelope))
            if inspect.isawaitable(value):
                value = await value
            if isinstance(value, StreamingResponse):
                value = await collect_stream(value)
            return self._result(value, envelope)
        except BaseException as error:
            _raise_if_stopped(error)
            return self._failed(error, envelope)

    def run_batch(self, method: Method, envelopes: list[Envelope]) -> list[Result]:
        """One plain call for all of them."""
        try:
            values = split_results(method.function([self.request(envelope) for envelope in envelopes]), len(envelopes))
        except BaseException as error:
            _raise_if_stopped(error)
            return [self._failed(error, envelope) for envelope in envelopes]
        return self._results(values, envelopes)

    async def run_batch_async(self, method: Method, envelopes: list[Envelope]) -> list[Result]:
        """One async call for all of them."""
        try:
            values = split_results(await method.function([self.request(envelope) for envelope in envelopes]), len(envelopes))
        except BaseException as error:
            _raise_if_stopped(error)
            return [self._failed(error, envelope) for envelope in envelopes]
        return self._results(values, envelopes)

    def _results(self, values: list[Any], envelopes: list[Envelope]) -> list[Result]:
        results: list[Result] = []
        for value, envelope in zip(values, envelopes, strict=True):
            try:
                results.append(self._result(value, envelope))
            except BaseException as error:
                _raise_if_stopped(error)
                results.append(self._failed(error, envelope))
        return results

    def request(self, envelope: Envelope) -> Request | ServeRequest:
        if envelope.header.origin == "http":
            return Request(envelope)
        return ServeRequest(envelope, lambda: self._content(envelope))

    def _content(self, envelope: Envelope) -> tuple[Any, dict[str, Any]]:
        """(data, keyword arguments)."""
        try:
            claim = Claim("request", self.backend, envelope.id)
            content = decode_value(envelope.body, envelope.content_type, self.signer, claim)
        except BadEnvelope as error:
            raise BadBody(str(error)) from error
        if envelope.header.origin != "handle":
            return content, {}
        if not (isinstance(content, list) and len(content) == 2 and isinstance(content[1], dict)):
            raise BadBody("the mq header says that a handle sent this, and the body is none of a handle's: leave the header out")
        return content[0], content[1]

    def _result(self, value: Any, envelope: Envelope) -> Result:
        if inspect.isawaitable(value) or inspect.isgenerator(value) or inspect.isasyncgen(value):
            raise BadType(
                f"the handler returned a {type(value).__name__}, which is no result: write `async def` and await it, or return a list"
            )
        if envelope.header.origin == "handle":
            result = value_result(value, self.backend, envelope.id, self.signer)
        else:
            result = plain_result(value, self.backend)
        if len(result.body) <= MAX_BODY_BYTES:
            return result
        message = f"the result has {len(result.body)} bytes and the limit is {MAX_BODY_BYTES}: return less, or a reference to it"
        return Result(status=500, backend=self.backend, error=ErrorInfo(type="mqserve.TooLarge", message=message))

    def _failed(self, error: BaseException, envelope: Envelope) -> Result:
        result = error_result(error, self.backend, envelope.future_id(self.backend), self.signer)
        if result.status == 500:
            logger.error("request %s of %s failed", envelope.id or "without an id", self.backend, exc_info=error)
        return result


def _raise_if_stopped(error: BaseException) -> None:
    """Whatever user code raises is its request's result, `sys.exit()` too; only the worker's own end is not."""
    if not isinstance(error, asyncio.CancelledError):
        return
    try:
        task = asyncio.current_task()
    except RuntimeError:  # a thread of the pool
        return
    if task is not None and task.cancelling():
        raise error


def check_direct(envelope: Envelope) -> None:
    """Raises BadEnvelope for a direct publisher's body that is not what it says it is, before any slot is spent on it."""
    if not envelope.header.origin:
        check_plain(envelope.body, envelope.content_type)
