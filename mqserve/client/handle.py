"""Handles: the Python callers of one endpoint."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self, overload

from ..broker.envelope import RequestHead, mint_id
from ..broker.errors import BadType, BadValue
from .answers import check_results
from .futures import Future
from .job_calls import Order
from .job_options import Priority, check_job_options
from .jobs import Job
from .mapping import map_items, map_items_soon
from .streams import Stream

if TYPE_CHECKING:
    from .sender import Sender


class Address(NamedTuple):
    """The address of an instance, by which another process finds it. It travels with pickled clients and handles; URLs and keys do not."""

    namespace: str
    instance: str


@dataclass(frozen=True, slots=True)
class HandleOptions:
    """The options set by `options()`; each handle has its own."""

    method_name: str = "__call__"
    shard_key: str | None = None
    http_method: str = "GET"
    http_headers: Mapping[str, str] = field(default_factory=dict)
    request_timeout_s: float | None = None
    results: Literal["any", "plain"] = "any"
    resumable: bool = False
    delay_s: float = 0
    eta: datetime | None = None
    expires_s: float | None = None
    priority: Priority = "normal"
    result_ttl_s: float | None = None
    tag: str = ""
    idempotency_key: str = ""
    callback_url: str = ""

    def __post_init__(self) -> None:
        check_results(self.results)
        if not isinstance(self.resumable, bool):
            raise BadValue(f"resumable must be True or False, not {self.resumable!r}")
        timeout_s = self.request_timeout_s
        if timeout_s is not None and not (isinstance(timeout_s, int | float) and 0 < timeout_s < math.inf):
            raise BadValue(f"request_timeout_s must be a number of seconds above 0, not {timeout_s!r}")
        check_job_options(self)


class Home(Protocol):
    """The client behind a handle, as far as the handle knows it."""

    @property
    def sender(self) -> Sender: ...

    @property
    def address(self) -> Address: ...


class _BaseHandle:
    """A caller of one endpoint. `options` returns a changed copy and leaves this one as it is. A pickled handle finds its instance again
    where it is unpickled."""

    def __init__(self, endpoint: str, home: Home, options: HandleOptions | None = None, *, missing_ok: bool = False) -> None:
        self._endpoint = endpoint
        self._home = home
        self._options = options or HandleOptions()
        self._missing_ok = missing_ok

    def __repr__(self) -> str:
        return f"{type(self).__name__}(endpoint={self._endpoint!r})"

    def _parts(self) -> tuple[str, Address, HandleOptions, bool]:
        """The parts that are pickled (see `pickled_clients.py`): endpoint, instance's address, options, and whether the endpoint may be
        missing."""
        return self._endpoint, self._home.address, self._options, self._missing_ok

    @overload
    def options(self, *, stream: Literal[True], **options: Any) -> StreamHandle: ...
    @overload
    def options(self, *, stream: Literal[False] | None = None, **options: Any) -> Self: ...

    def options(self, *, stream: bool | None = None, **options: Any) -> Self | StreamHandle:
        """Returns a handle with these options: method_name, shard_key, http_method, http_headers, request_timeout_s (which may only
        shorten the backend's), results ("plain": no pickle in a result is opened, and a result that needs one raises NotEncodable),
        resumable (a stream can be read on by its id, see `serve.stream`). Later ones override earlier ones. With stream=True the handle's
        `remote` is `stream`, as in Ray Serve 2.

        Of `submit` alone: delay_s or eta (it does not begin before), expires_s (it begins within so many seconds from now, or never),
        priority ("high", "normal" or "low"), result_ttl_s (how long its result is kept), tag (a word by which jobs are listed),
        idempotency_key (a second job with the same key is not sent, and the first one is returned instead), callback_url (a URL that is
        told of the job's end).

        Raises BadType for another name, BadType and BadValue for a bad value."""
        try:
            merged = replace(self._options, **options)
        except TypeError:
            known = ", ".join(["stream", *HandleOptions.__dataclass_fields__])
            raise BadType(f"a handle has no option {', '.join(options)}: there are {known}") from None
        if stream is False and isinstance(self, StreamHandle):
            raise BadValue("this handle was made by options(stream=True): for answers in one piece take the one that it was made of")
        kind = StreamHandle if stream else type(self)
        return kind(self._endpoint, self._home, merged, missing_ok=self._missing_ok)

    def stream(self, data: Any = None, /, **arguments: Any) -> Stream:
        """Sends a request like `remote`, and returns at once the stream of the values that its handler yields: iterate with `for`, or with
        `async for` in a coroutine."""
        options = self._options
        return self._home.sender.stream(
            self._head(),
            options.shard_key or "",
            data,
            arguments,
            wait_for_endpoint=self._missing_ok,
            timeout_s=options.request_timeout_s,
            plain=options.results == "plain",
            resumable=options.resumable,
        )

    def _send(self, data: Any, arguments: dict[str, Any]) -> Future:
        options = self._options
        return self._home.sender.send(
            self._head(),
            options.shard_key or "",
            data,
            arguments,
            wait_for_endpoint=self._missing_ok,
            timeout_s=options.request_timeout_s,
            plain=options.results == "plain",
        )

    def _order(self, data: Any, arguments: dict[str, Any]) -> Order:
        options = self._options
        return Order(
            mint_id(),
            self._head(),
            options.shard_key or "",
            options,
            data,
            arguments,
            wait_for_endpoint=self._missing_ok,
            plain=options.results == "plain",
        )

    def _head(self) -> RequestHead:
        options = self._options
        headers = {name.lower(): value for name, value in options.http_headers.items()}
        call = "" if options.method_name == "__call__" else options.method_name
        if call:
            headers["x-serve-call-method"] = call
        if options.shard_key is not None:
            headers["x-serve-shard-key"] = options.shard_key
        pairs = tuple((name.encode(), value.encode()) for name, value in headers.items())
        return RequestHead(method=options.http_method.upper(), headers=pairs, endpoint=self._endpoint, call=call)


class Handle(_BaseHandle):
    """A handle for plain code, in any thread: `ref = handle.remote(x)`, then `serve.get(ref)` or `ref.result()`."""

    def remote(self, data: Any = None, /, **arguments: Any) -> Future:
        """Sends a request and returns its future at once. The handler sees `data` as `request.data`, and the keyword arguments as
        `request.query_params`; a future among them is resolved first.

        Raises NotEncodable for a value that cannot be encoded. Later failures of the request are raised by the future.
        """
        return self._send(data, arguments)

    def submit(self, data: Any = None, /, **arguments: Any) -> Job:
        """Sends a job: a request that is kept until it is done, and that any process finds again by its id. Returns once the broker has
        confirmed its message, which survives a restart of the broker. The handler sees the arguments as those of `remote`.

        With an `idempotency_key` that a job of this endpoint has had within 24 hours (or its `result_ttl_s`), that job is returned, unless
        it was not begun in time. KeyMisused is raised if it had other data, as far as that is not pickled.

        Neither `request_timeout_s` nor the time left to a handler that calls this limits a job; shadows get no copy of it. Raises
        NotEncodable, UnknownEndpoint, BadValue for an `eta` that is too far away, and what kept the job from being accepted: Overloaded,
        TooLarge, NotRouted, BrokerUnavailable (with `maybe_sent`, it may have been accepted all the same) and StoreUnavailable.
        """
        jobs = self._home.sender.jobs
        return jobs.wait(jobs.submit(self._order(data, arguments)))

    def map(
        self, items: Iterable[Any], *, ordered: bool = True, in_flight: int = 100, progress: bool | None = None
    ) -> Generator[Any, None, None]:
        """Sends a request for each item and yields their values, in the order of the items or, with `ordered=False`, as they come. At most
        `in_flight` items have been sent whose values were not taken, so the items may be endless. Shows a progress bar on standard error if
        that is a terminal, or as `progress` says.

        The first error is raised in the place of its value. It ends the rest, as leaving the loop does: what is under way is cancelled.
        """
        send = partial(self._send, arguments={})
        return map_items(send, items, self._endpoint, ordered=ordered, in_flight=in_flight, progress=progress)


class AsyncHandle(_BaseHandle):
    """A handle for coroutines: `ref = await handle.remote(x)`, then `await ref`."""

    async def remote(self, data: Any = None, /, **arguments: Any) -> Future:
        """Like `Handle.remote`."""
        return self._send(data, arguments)

    async def submit(self, data: Any = None, /, **arguments: Any) -> Job:
        """Like `Handle.submit`."""
        jobs = self._home.sender.jobs
        return await jobs.wait_soon(jobs.submit(self._order(data, arguments)))

    def map(
        self, items: Iterable[Any], *, ordered: bool = True, in_flight: int = 100, progress: bool | None = None
    ) -> AsyncGenerator[Any, None]:
        """Like `Handle.map`, for `async for`."""
        send = partial(self._send, arguments={})
        return map_items_soon(send, items, self._endpoint, ordered=ordered, in_flight=in_flight, progress=progress)


class StreamHandle(_BaseHandle):
    """A handle of `options(stream=True)`, for code written for Ray Serve 2: `for value in handle.remote(x)`, or `async for` without an
    `await` before `remote`."""

    def remote(self, data: Any = None, /, **arguments: Any) -> Stream:
        """The same as `stream`."""
        return self.stream(data, **arguments)
