"""The request objects that user code gets: a Starlette request for HTTP, an object of the same shape for handles and direct publishers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import msgspec
from starlette.convertors import CONVERTOR_TYPES
from starlette.datastructures import FormData, Headers, State
from starlette.requests import Request as StarletteRequest
from starlette.requests import empty_send
from starlette.types import Receive, Scope

from ..broker.envelope import RequestHead
from ..broker.errors import UNPARSABLE, BadEnvelope, BadType
from ..broker.failures import describe
from ..broker.values.codecs import JSON, decode_plain, media_type
from ..controller.state.config import MAX_JOB_TIMEOUT_S
from .form_bodies import FORMS, BadForm, as_dict, parse_form
from .stages import Job

_LOOK_EVERY_S = 0.05  # while user code waits for the client to leave

_UNREAD: Any = object()


class BadBody(BadEnvelope):
    """The caller's body does not parse as its content type: 422, unless the handler catches this."""

    status = 422


class Request(StarletteRequest):
    """An HTTP request; `path_params` are typed by the route's convertors, and `.data` needs no await.

    `id` is the same in every run of the request, `attempt` the number of this run. `state` holds the plain data that middlewares in the
    proxy set.

    Most handlers read little of a request. So what Starlette's constructor would set is a default of this class or made at first use, and
    that constructor is not called.
    """

    _send = staticmethod(empty_send)
    _stream_consumed = False
    _is_disconnected = False
    _form = None

    def __init__(self, job: Job) -> None:
        envelope = job.envelope
        self._job = job
        self._body = envelope.body  # Starlette reads it from here rather than by `receive`
        self._data: Any = _UNREAD
        self.id = envelope.id
        self.attempt = envelope.attempt

    @cached_property
    def scope(self) -> Scope:  # type: ignore[override]
        return http_scope(self._job.envelope.header.meta)

    @cached_property
    def _receive(self) -> Receive:  # type: ignore[override]
        return Receiver(self._job)

    @property
    def data(self) -> Any:
        """The body decoded by its content type: JSON and MessagePack, a form as a dict (with a list for a field that came several times),
        text as str, other bytes unchanged; None for an empty body of JSON, MessagePack or a form. Raises BadBody."""
        if self._data is _UNREAD:
            self._data = self._decode()
        return self._data

    @property
    def state(self) -> Any:
        if not hasattr(self, "_state"):
            self._state = TravelledState(self.scope["state"], self._job.envelope.header.meta.lost_state or {})
        return self._state

    @property
    def raw(self) -> bytes:
        """The body as it came."""
        return self._body

    @property
    def deadline(self) -> datetime:
        """When its time is spent: then nobody waits for the answer any more, or the job has run for `job_timeout_s`."""
        return deadline_of(self._job)

    @property
    def resume_after(self) -> int:
        """How many chunks earlier runs of this request have shown (`on_death="replay"`); 0 in a first run. A handler that reads it has to
        begin behind them; for any other they are passed over."""
        return 0 if self._job.flow is None else self._job.flow.resume_after

    async def json(self) -> Any:
        """Like Starlette's, but raises BadBody for malformed JSON."""
        return _decode_json(self._body)

    async def is_disconnected(self) -> bool:
        """Whether nobody waits for the answer: the client has gone, the request was cancelled, or its deadline has passed."""
        return self._job.unwanted

    def _decode(self) -> Any:
        content_type = self._job.envelope.content_type
        if media_type(content_type) in FORMS:
            return as_dict(self._parse_form()) if self._body else None
        return _decode(self._body, content_type)

    async def _get_form(self, **limits: Any) -> FormData:
        """Starlette's `form()` and its context manager call this."""
        if self._form is None:
            self._form = self._parse_form(**limits)
        return self._form

    def _parse_form(self, **limits: Any) -> FormData:
        try:
            return parse_form(self.headers, self._body, **limits)
        except BadForm as error:
            raise BadBody(f"the form does not parse ({error}): send what its Content-Type says") from error


class TravelledState(State):
    """The `request.state` that middlewares in the proxy set. A value that is not plain data did not travel; reading it raises
    AttributeError with the reason."""

    def __init__(self, state: dict[str, Any], lost: Mapping[str, str]) -> None:
        super().__init__(state)
        object.__setattr__(self, "_lost", lost)  # name -> type

    def __getattr__(self, name: str) -> Any:
        lost: Mapping[str, str] = object.__getattribute__(self, "_lost")
        if name in lost and name not in self._state:
            raise AttributeError(
                f"a middleware in the proxy set state.{name} to a {lost[name]}, which does not travel to a replica: set plain data there"
            )
        return super().__getattr__(name)


class Receiver:
    """ASGI's `receive` for a request whose body is complete: returns the body, then waits until the client leaves."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._is_read = False

    async def __call__(self) -> dict[str, Any]:
        if not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": self._job.envelope.body, "more_body": False}
        while not self._job.unwanted:
            await asyncio.sleep(_LOOK_EVERY_S)
        return {"type": "http.disconnect"}


class ServeRequest:
    """A request of a handle or of a direct publisher, in the shape of a web request.

    `id` is the same in every run of the request (empty for a message without one), `attempt` the number of this run.
    """

    def __init__(self, job: Job, load: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
        envelope = job.envelope
        self._job = job
        self._load = load
        self._loaded: tuple[Any, dict[str, Any]] | None = None
        self._is_direct = not envelope.header.origin
        self._raw = envelope.body if self._is_direct else b""
        self.id = envelope.id
        self.attempt = envelope.attempt
        self.method = envelope.header.meta.method

    def __repr__(self) -> str:
        return f"<ServeRequest {self.method}>"

    @cached_property
    def headers(self) -> Headers:
        return Headers(raw=list(self._job.envelope.header.meta.headers))

    @cached_property
    def path_params(self) -> dict[str, Any]:
        return convert_params(self._job.envelope.header.meta)

    @property
    def data(self) -> Any:
        """The object that the handle sent, or the published body decoded by its content type."""
        return self._content()[0]

    @property
    def raw(self) -> bytes:
        """A direct publisher's body as it came; empty for a handle's object."""
        return self._raw

    @property
    def deadline(self) -> datetime:
        """See `Request.deadline`."""
        return deadline_of(self._job)

    @property
    def resume_after(self) -> int:
        """See `Request.resume_after`."""
        return 0 if self._job.flow is None else self._job.flow.resume_after

    @property
    def query_params(self) -> Mapping[str, Any]:
        """The keyword arguments of `remote`, unchanged; with `getlist` and `multi_items` like a web request's."""
        return _Arguments(self._content()[1])

    async def body(self) -> Any:
        """Returns the handle's object, of any type as in the seed; for a direct publisher's message its bytes."""
        return self._raw if self._is_direct else self.data

    async def json(self) -> Any:
        """Returns the object itself; text and bytes are parsed first."""
        if isinstance(self.data, str | bytes):
            return _decode_json(self.data.encode() if isinstance(self.data, str) else self.data)
        return self.data

    async def form(self) -> dict[str, Any]:
        """Returns the dict that was sent. Raises BadType for anything else."""
        if not isinstance(self.data, dict):
            raise BadType(f"form() needs a dict, and the request carries a {type(self.data).__name__}: send a dict, or read .data")
        return self.data

    def _content(self) -> tuple[Any, dict[str, Any]]:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded


class _Arguments(dict[str, Any]):
    def getlist(self, key: str) -> list[Any]:
        if key not in self:
            return []
        return list(self[key]) if isinstance(self[key], list) else [self[key]]

    def multi_items(self) -> list[tuple[str, Any]]:
        return [(key, item) for key in self for item in self.getlist(key)]


def deadline_of(job: Job) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=min(job.deadline - time.monotonic(), MAX_JOB_TIMEOUT_S))


def convert_params(meta: RequestHead) -> dict[str, Any]:
    """Returns the typed path parameters. The proxy matched the text by the same convertors. Raises BadBody."""
    try:
        return {name: CONVERTOR_TYPES[convertor].convert(text) for name, convertor, text in meta.params}
    except BaseException as error:  # user code, and perhaps a stranger's header: not even SystemExit may end the replica
        raise BadBody(f"the path parameters do not convert ({describe(error).words})") from error


def http_scope(meta: RequestHead) -> dict[str, Any]:
    """Returns the ASGI scope that the proxy had."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": meta.http_version,
        "method": meta.method,
        "scheme": meta.scheme,
        "path": meta.path,
        "raw_path": meta.raw_path or meta.path.encode(),
        "root_path": meta.root_path,
        "query_string": meta.query,
        "headers": list(meta.headers),
        "path_params": convert_params(meta) if meta.params else {},
        "client": meta.client,
        "server": meta.server,
        "state": dict(meta.state or {}),
    }


def _decode(body: bytes, content_type: str) -> Any:
    try:
        return decode_plain(body, content_type)
    except BadEnvelope as error:
        raise BadBody(str(error)) from error


def _decode_json(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except UNPARSABLE as error:
        raise BadBody(f"the body does not parse as {JSON} ({error}): send JSON") from error
