"""Sends a handle's request: chooses the backend and encodes in the caller's thread, publishes on the runtime thread, and returns the
future."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..broker.calls.call import Ticket
from ..broker.calls.incoming import IncomingStream
from ..broker.calls.sending import RequestSender
from ..broker.documents import until
from ..broker.envelope import RequestHead, is_minted, mint_id
from ..broker.errors import BadSignature, BadValue, InstanceError, MQServeError, RequestTimeout, UnknownEndpoint
from ..broker.results import Phase, Result
from ..broker.streams import Chunk, End, Form, Owner
from ..broker.values.codecs import encode_value
from ..broker.values.signing import SealScope
from ..connections import Connections
from ..controller.state.documents import Desired, Endpoint
from ..controller.state.traffic import choose, longest_s
from ..replicas.context import deadline
from .answers import read_result
from .deploying import open_block
from .deployments import Deployments
from .futures import WAIT_LIMIT_S, Found, Future, Sent, Stored
from .job_calls import JobCalls, Order
from .job_options import NoOptions
from .membership import Membership
from .runtime import Runtime
from .streams import Began, Flowing, Stream, StreamTicket

APPEAR_BUDGET_S = 60.0  # how long a handle made with missing_ok waits for its endpoint
_BEGINNING_EVERY_S = 0.2  # how often the store is asked whether a stream has begun
_STOPPED = "the client reads no results any more: see its log"


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of `remote` or `stream`. `chunks` is that of the header: whether it takes chunks."""

    id: str
    meta: RequestHead
    shard_key: str
    data: Any
    arguments: dict[str, Any]
    within_s: float
    pending: concurrent.futures.Future[Any]  # of Found, or of Began if it takes chunks
    chunks: int = 0


class Sender:
    """The sender of one client, shared by all its handles. The client replaces `desired` when the document changes."""

    def __init__(
        self,
        runtime: Runtime,
        connections: Connections,
        requests: RequestSender,
        membership: Membership,
        deployments: Deployments,
        find: Callable[[], Sender],
    ) -> None:
        self._runtime = runtime
        self._connections = connections
        self._requests = requests
        self._membership = membership
        self._deployments = deployments
        self.find = find  # returns the client's sender in this process: a forked child has another one
        self._signer = connections.settings.signer
        self.jobs = JobCalls(self, runtime, connections, requests)
        self._piped: set[str] = set()  # ids of requests to pipelines that have no result yet
        self._over = ""  # why the client has ended, once it has
        self.desired = Desired()
        self.only_plain = False  # open no pickle in a result
        self.key_problem = ""  # why the instance's replicas refuse what this process sends

    def __repr__(self) -> str:
        return f"<Sender with {len(self.desired.endpoints)} endpoints>"

    def send(
        self,
        meta: RequestHead,
        shard_key: str,
        data: Any,
        arguments: dict[str, Any],
        *,
        wait_for_endpoint: bool,
        timeout_s: float | None = None,
        plain: bool = False,
    ) -> Future:
        """Sends a request and returns its future at once. Futures among the arguments are resolved before the request is sent.

        The request's time is the backend's `request_timeout_s`, shortened by `timeout_s` and, in a handler, by the time left to the
        request that it handles. Raises UnknownEndpoint, NotEncodable, BadSignature without the key that replicas demand, and
        InstanceError if the instance was shut down; later errors are raised by the future.
        """
        call = _Call(mint_id(), meta, shard_key, data, arguments, min(timeout_s or math.inf, _left_s()), concurrent.futures.Future())
        self._begin(call, wait_for_endpoint)
        return Future(call.id, Sent(call.pending, self, plain=plain))

    def stream(
        self,
        meta: RequestHead,
        shard_key: str,
        data: Any,
        arguments: dict[str, Any],
        *,
        wait_for_endpoint: bool,
        timeout_s: float | None = None,
        plain: bool = False,
        resumable: bool = False,
    ) -> Stream:
        """Sends a request like `send`, and returns the stream of its answer at once. The request's time runs to the first chunk."""
        within_s = min(timeout_s or math.inf, _left_s())
        call = _Call(mint_id(), meta, shard_key, data, arguments, within_s, concurrent.futures.Future(), 2 if resumable else 1)
        self._begin(call, wait_for_endpoint)
        return Stream(call.id, call.pending, self, plain=plain)

    def _begin(self, call: _Call, wait_for_endpoint: bool) -> None:
        call.pending.add_done_callback(partial(self._cancel_with, call.id))  # without the call, which refers to `pending`
        if self.has_to_wait(call.meta.endpoint, call.data, call.arguments, wait_for_endpoint=wait_for_endpoint):
            self._runtime.submit(self._send_later(call))
        else:
            self._send_now(call)

    def has_to_wait(self, endpoint: str, data: Any, arguments: dict[str, Any], *, wait_for_endpoint: bool) -> bool:
        """Whether `ready` has to be awaited before the request can be sent. Raises what `send` does."""
        if self.key_problem:
            raise BadSignature(self.key_problem)
        awaited = [value.here() for value in (data, *arguments.values()) if isinstance(value, Future)]
        is_missing = endpoint not in self.desired.endpoints
        if (block := open_block(self._deployments)) is not None:
            block.before_call(endpoint, is_missing=is_missing, waits=wait_for_endpoint)
            is_missing = endpoint not in self.desired.endpoints
        if is_missing and not wait_for_endpoint:
            # another process may have created it just now: a pickled handle can arrive before the document
            if not self._runtime.call(self._is_there(endpoint)):
                raise UnknownEndpoint(f"Endpoint '{endpoint}' does not exist.")
            is_missing = False
        return bool(awaited) or is_missing

    async def ready(self, endpoint: str, data: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Returns the arguments with the values of futures, once the endpoint is there."""
        if endpoint not in self.desired.endpoints:
            await self._until_there(endpoint)
        return await _resolved(data), {name: await _resolved(value) for name, value in arguments.items()}

    def _send_now(self, call: _Call) -> None:
        desired = self.desired
        endpoint = self.find_endpoint(desired, call.meta.endpoint)
        if endpoint.stages:
            return self._send_through(desired, endpoint, call)
        backend, shadows = choose(endpoint, call.shard_key)
        copies = [self._prepare_shadow(desired, shadow, call) for shadow in shadows]
        self._runtime.post(self._prepare(desired, backend, call, copies))

    def _send_through(self, desired: Desired, pipeline: Endpoint, call: _Call) -> None:
        """Sends a request to a pipeline: a job whose caller waits for it. Raises BadValue for one that wants a stream."""
        if call.chunks:
            raise BadValue(f"{pipeline.name!r} is a pipeline, whose answer comes in one piece: call remote() or submit()")
        order = Order(
            call.id, call.meta, call.shard_key, NoOptions(), call.data, call.arguments, wait_for_endpoint=False, plain=False
        )  # fmt: skip
        work = self.jobs.encoded(order)
        timeouts_s = {name: backend.config.request_timeout_s for name, backend in desired.backends.items()}
        within_s = min(call.within_s, longest_s(pipeline, desired.endpoints, timeouts_s))
        self._piped.add(call.id)
        call.pending.add_done_callback(lambda _: self._piped.discard(call.id))
        self._runtime.submit(self._await_pipeline(call, work, within_s))

    async def _await_pipeline(self, call: _Call, work: Coroutine[Any, Any, Any], within_s: float) -> None:
        try:
            if call.pending.cancelled():
                return work.close()
            await work
            if call.pending.cancelled():  # while it was sent: its record was not there yet to be ended
                return await self.jobs.cancel_soon(call.id)
            result = await self._requests.pending.job_result(call.id, within_s)
        except asyncio.CancelledError:
            _fail(call.pending, InstanceError(self._over or _STOPPED))
            raise
        except TimeoutError:
            after = f"pipeline {call.meta.endpoint!r} has no result after {within_s:g} s, and goes on: serve.job({call.id!r}) finds it"
            _fail(call.pending, RequestTimeout(after, phase=Phase.RUN))
        except Exception as error:
            _fail(call.pending, error)
        else:
            if call.pending.set_running_or_notify_cancel():
                call.pending.set_result((call.id, result))

    def find_endpoint(self, desired: Desired, name: str) -> Endpoint:
        """Raises UnknownEndpoint for one that was deleted while the arguments of a call were awaited."""
        endpoint = desired.endpoints.get(name)
        if endpoint is None:
            raise UnknownEndpoint(f"Endpoint '{name}' does not exist.")
        return endpoint

    def _prepare(self, desired: Desired, backend: str, call: _Call, copies: Sequence[Callable[[], None]]) -> Callable[[], None]:
        """Returns a function that sends the request and then its shadow copies; if the request is refused, no copies are sent."""
        content_type, body = encode_value([call.data, call.arguments], self._signer, SealScope("request", backend, call.id))
        config = desired.backends[backend].config

        def send() -> None:
            if call.pending.done():  # cancelled meanwhile
                return
            if self._over:
                return _fail(call.pending, InstanceError(self._over))
            ticket: Ticket | StreamTicket = StreamTicket(call.id) if call.chunks else Ticket(call.id)
            try:
                self._requests.send(
                    ticket,
                    backend,
                    body,
                    content_type,
                    call.meta,
                    origin="handle",
                    timeout_s=min(config.request_timeout_s, call.within_s),
                    replay_s=config.replay_s,
                    at_most_once=config.delivery == "at_most_once",
                    stream=call.chunks,
                )
            except MQServeError as error:
                _fail(call.pending, error)
            else:
                ticket.future.add_done_callback(lambda done: self._pass_on(done, call))
                for send_copy in copies:
                    send_copy()

        return send

    def _prepare_shadow(self, desired: Desired, backend: str, call: _Call) -> Callable[[], None]:
        shadow_id = mint_id()  # a seal is valid for one id and one backend, so each copy has its own
        content_type, body = encode_value([call.data, call.arguments], self._signer, SealScope("request", backend, shadow_id))
        timeout_s = desired.backends[backend].config.request_timeout_s

        def send() -> None:
            if not self._over:
                self._requests.send_shadow(
                    backend, body, content_type, call.meta, origin="handle", timeout_s=timeout_s, shadow_id=shadow_id
                )

        return send

    async def _send_later(self, call: _Call) -> None:
        try:
            data, arguments = await self.ready(call.meta.endpoint, call.data, call.arguments)
            await asyncio.to_thread(self._send_now, replace(call, data=data, arguments=arguments))
        except asyncio.CancelledError:
            _fail(call.pending, InstanceError(self._over or _STOPPED))
            raise
        except Exception as error:
            _fail(call.pending, error)

    def _pass_on(self, done: asyncio.Future[Any], call: _Call) -> None:
        pending = call.pending
        error = InstanceError(self._over or _STOPPED) if done.cancelled() else done.exception()
        if not pending.set_running_or_notify_cancel():
            return  # and `_cancel_with` cancels the request, also one whose answer has begun
        if error is not None:
            pending.set_exception(error)
        else:
            pending.set_result((call.id, done.result()))

    def _cancel_with(self, future_id: str, pending: concurrent.futures.Future[Any]) -> None:
        if not pending.cancelled():
            return
        if future_id in self._piped:
            with suppress(InstanceError):
                self._runtime.submit(self.jobs.cancel_soon(future_id))
        else:
            self.cancel_soon(future_id)

    def cancel_soon(self, future_id: str) -> None:
        """Cancels a request for everybody, without waiting for that."""
        self.post(partial(self._requests.cancel, future_id))

    def post(self, callback: Callable[[], None]) -> None:
        """Runs it on the runtime thread, soon, unless the client has ended."""
        with suppress(InstanceError):  # the client is closed, so nobody is left to tell
            self._runtime.post(lambda: None if self._over else callback())

    def end(self, why: str) -> None:
        """Called on the runtime thread before it stops reading results: later requests fail at once, pending ones fail when the reading
        ends, and streams are left."""
        self._over = why
        self._requests.leave_all()

    async def _is_there(self, endpoint: str) -> bool | None:
        found = await self._membership.read()
        if endpoint not in found.endpoints:
            return None
        self.desired = found
        return True

    async def _until_there(self, endpoint: str) -> None:
        try:
            await until(self._connections.store, lambda: self._is_there(endpoint), APPEAR_BUDGET_S)
        except TimeoutError:
            raise UnknownEndpoint(f"Endpoint '{endpoint}' does not exist, and did not appear within {APPEAR_BUDGET_S:g} s.") from None

    def future(self, future_id: str, backend: str | None, key: str) -> Future:
        """See `Client.future`. Its result stands under `key`."""
        keys = [key]
        if backend is not None and is_minted(future_id):
            keys.insert(0, future_id)  # try both: it may be a minted id or a publisher's own key of the same form
        return Future(future_id, Stored(keys, self, backend=backend))

    # For streams.

    @property
    def over(self) -> str:
        """Why the client has ended; empty until then."""
        return self._over

    def more(self, incoming: IncomingStream) -> concurrent.futures.Future[tuple[deque[Chunk], End | None]]:
        """Returns a future of the next chunks of an answer, and of its end if they are the last ones. What was taken before counts as
        taken by the caller from now on, and its replica gets credit for it."""
        return self._runtime.submit(_taken(incoming))

    def took(self, incoming: IncomingStream, seq: int, size: int) -> None:
        """See `IncomingStream.took`; does not wait for it."""
        self.post(partial(incoming.took, seq, size))

    def leave(self, incoming: IncomingStream) -> None:
        """See `RequestSender.leave`; does not wait for it."""
        self.post(partial(self._requests.leave, incoming))

    def resumed(self, stream_id: str, after: int) -> Stream:
        """See `Client.stream`."""
        began: concurrent.futures.Future[Began] = concurrent.futures.Future()
        self._runtime.submit(self._resume(stream_id, after, began))
        return Stream(stream_id, began, self, after=after)

    async def _resume(self, stream_id: str, after: int, began: concurrent.futures.Future[Began]) -> None:
        try:
            found = await self._resumed(stream_id, after, began)
        except asyncio.CancelledError:
            _fail(began, InstanceError(self._over or _STOPPED))
            raise
        except Exception as error:
            return _fail(began, error)
        if began.set_running_or_notify_cancel():
            began.set_result((stream_id, found))
        elif isinstance(found, Flowing):  # closed meanwhile
            self._requests.leave(found.incoming)

    async def _resumed(self, stream_id: str, after: int, began: concurrent.futures.Future[Began]) -> Result | Flowing:
        streams = self._requests.pending.streams
        owner = await self._beginning(stream_id, began) if after == 0 else await streams.owner(stream_id)
        if isinstance(owner, Result):
            return owner
        found = await streams.resume(stream_id, owner, after, Form.VALUES) if owner is not None and owner.resumable else None
        if owner is None or found is None:
            raise BadValue(
                f"request {stream_id} has no stream to go on with: it has shown nothing in its time, was not sent by stream() of a handle "
                "with options(resumable=True), or ended longer ago than result_ttl_s"
            )
        incoming, first = found
        if first > after + 1:
            self._requests.leave(incoming)
            raise BadValue(
                f"what came next after chunk {after} of stream {stream_id} is not kept any more: the first one that is there comes after "
                f"chunk {first - 1}"
            )
        return Flowing(incoming, owner.backend)

    async def _beginning(self, stream_id: str, began: concurrent.futures.Future[Began]) -> Owner | Result | None:
        """Waits until the stream has begun. Returns the result of a request that failed before that, and None where none begins in the time
        that a request may take, or before its reader closes it."""
        pending = self._requests.pending
        until = time.monotonic() + max((backend.config.request_timeout_s for backend in self.desired.backends.values()), default=0)
        while True:
            result = await pending.peek(stream_id)  # before the owner: a stream may begin and end in between
            if (owner := await pending.streams.owner(stream_id)) is not None:
                return owner
            if result is not None:
                return None if result.error is None else result
            if time.monotonic() > until or began.cancelled():
                return None
            await asyncio.sleep(_BEGINNING_EVERY_S)

    # For futures.

    @property
    def prospects(self) -> str:
        """What becomes of a request of this process that has no result yet: a clause."""
        if self._membership.has_ended:
            return "its instance has been shut down, so nobody is about to answer it"
        return "it goes on: wait again, or raise the timeout"

    def has_result(self, keys: Sequence[str]) -> bool:
        """Whether one of these requests is done. Raises StoreUnavailable if the store cannot be asked."""
        return self._runtime.call(self._requests.pending.has_result(keys))

    def first_result(self, keys: Sequence[str]) -> concurrent.futures.Future[Found]:
        """Returns a future of the first result among these keys. Cancel it to stop waiting."""
        return self._runtime.submit(self._first_result(keys))

    async def _first_result(self, keys: Sequence[str]) -> Found:
        async with asyncio.timeout(WAIT_LIMIT_S):
            return await self._requests.pending.first_result(keys)

    def cancel_everywhere(self, keys: Sequence[str]) -> bool:
        """Cancels these requests for everybody; returns whether one of them had no result yet. Raises StoreUnavailable."""
        return self._runtime.call(self._cancel_everywhere(keys))

    async def _cancel_everywhere(self, keys: Sequence[str]) -> bool:
        return any(await asyncio.gather(*map(self._requests.cancel_everywhere, keys)))

    def read(self, key: str, result: Result, *, backend: str | None = None, plain: bool = False) -> Any:
        """See `read_result`."""
        return read_result(result, key, self._signer, backend, plain=plain or self.only_plain)


async def _taken(incoming: IncomingStream) -> tuple[deque[Chunk], End | None]:
    chunks = await incoming.more()
    return deque(chunks), incoming.end  # asked here, since more may come at any time


def _left_s() -> float:
    """Returns the time left to the request in whose handler this runs; infinite outside a handler."""
    return max(0.001, deadline() - time.monotonic())


def _fail(pending: concurrent.futures.Future[Any], error: BaseException) -> None:
    if not pending.done() and pending.set_running_or_notify_cancel():
        pending.set_exception(error)


async def _resolved(value: Any) -> Any:
    return await value if isinstance(value, Future) else value
